"""Which readings go to a prefill worker, and what happens when one fails: the text is read here, never a lost request.

A reading is sent away when the tokens of it that no state holds yet (the *uncached* length) pass a threshold, and shipping the
state is expected to take less time than reading here. A state has the same size whatever it has read, so beyond some length
shipping is always worth it; on a slow link that length is greater. Both rates are measured as the server goes.

The rule by uncached length is that of Prefill-as-a-Service (arXiv 2604.15039).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import httpx

from linstate.engine.language_model import LanguageModel
from linstate.errors import StateError
from linstate.serve import frames
from linstate.serve.metrics import Metrics
from linstate.serve.settings import Settings
from linstate.state.state import State
from linstate.state.store import model_key

log = logging.getLogger("linstate.serve")
Pool = Callable[[dict[str, Any]], AsyncIterator[bytes]]
"""Workers behind something that shares out requests itself (Ray Serve): the body of ``/v1/prefill`` to the bytes of its stream."""

_ASIDE = 10.0  # seconds for which a worker that failed is not asked
_TRIES = 3  # streams of one transfer: the first, and two that go on where it was cut


class Router:
    """Sends long readings away: to ``settings.workers`` over HTTP, or to ``pool``."""

    def __init__(
        self, model: LanguageModel, settings: Settings, metrics: Metrics, pool: Pool | None = None
    ) -> None:
        self.model, self.settings, self.metrics, self.pool = model, settings, metrics, pool
        self.local_rate = 0.0  # tokens a second that are read here; 0: not known
        self.bandwidth = 0.0  # bytes a second from workers; 0: not known
        self._aside: dict[str, float] = {}
        self._turn = itertools.count()
        self._client: httpx.AsyncClient | None = None

    def sends_away(self, uncached: int) -> bool:
        """Whether a reading of so many tokens that no state holds yet goes to a worker."""
        if not (self.settings.workers or self.pool) or uncached < self.settings.offload:
            return False
        if not self.local_rate or not self.bandwidth:
            return True
        return self.model.decoder.state_bytes(uncached) / self.bandwidth < uncached / self.local_rate

    def read_here(self, tokens: int, seconds: float) -> None:
        """Account a reading of this server."""
        if tokens >= 1024 and seconds > 0:
            self.local_rate = (
                tokens / seconds if not self.local_rate else 0.8 * self.local_rate + 0.2 * tokens / seconds
            )

    def _shipped(self, size: int, seconds: float) -> None:
        """Account a transfer: bytes behind the first layer, and their time. What computes meanwhile makes it an under-estimate."""
        if size > 0:
            rate = size / max(seconds, 1e-4)
            self.bandwidth = rate if not self.bandwidth else 0.8 * self.bandwidth + 0.2 * rate

    async def read(self, ids: tuple[int, ...]) -> State | None:
        """The state behind ``ids``, read by a worker; None when none could."""
        metrics, now = self.metrics, time.monotonic()
        everybody = ("the pool",) if self.pool else self.settings.workers
        workers = [w for w in everybody if self._aside.get(w, 0) <= now]
        first = next(self._turn)
        for n in range(len(workers)):
            worker = workers[(first + n) % len(workers)]
            try:
                state = await self._fetch(worker, ids)
            except Exception as error:  # whatever it is: the text can be read by another, or here
                self._aside[worker] = time.monotonic() + _ASIDE
                metrics.sent_away.labels("failed").inc()
                log.warning(
                    "prefill worker failed", extra={"fields": {"worker": worker, "error": str(error)[:200]}}
                )
                continue
            metrics.sent_away.labels("done").inc()
            return state
        metrics.sent_away.labels("local").inc()
        return None

    async def _fetch(self, worker: str, ids: tuple[int, ...]) -> State:
        """One transfer. Raises httpx.HTTPError, StateError, what the pool raises."""
        model = self.model
        body = {"ids": list(ids), "precision": self.settings.ship, "model": model_key(model.fingerprint)}
        largest = 2 * model.decoder.state_bytes(len(ids)) + (1 << 20)
        assembler, received, name, began, first = (
            frames.Assembler(model.fingerprint, model.decoder.state_table, len(model.decoder.blocks())),
            0,
            "",
            0.0,
            0,
        )
        for attempt in range(_TRIES):
            parser = frames.FrameReader(largest, received)
            if name:
                self.metrics.sent_away.labels("resumed").inc()
            try:
                async with self._open(worker, body, name, received) as (name, stream):
                    async for data in stream:
                        self.metrics.shipped.inc(len(data))
                        for frame in parser.feed(data):
                            if frame.kind is frames.Kind.LAYER and frame.number == 1:
                                began, first = time.perf_counter(), len(frame.payload)
                            assembler.add(frame)
                            received = parser.number
                if assembler.state is not None:
                    if began:
                        self._shipped(assembler.state.nbytes - first, time.perf_counter() - began)
                    return self._checked(assembler.state, ids)
            except httpx.TransportError:
                if not name or attempt == _TRIES - 1:
                    raise
            if not name:
                break
        raise StateError(f"{worker}: the state was cut off")

    @contextlib.asynccontextmanager
    async def _open(
        self, worker: str, body: dict[str, Any], name: str, received: int
    ) -> AsyncGenerator[tuple[str, AsyncIterator[bytes]]]:
        """A stream of frames and the name of its transfer (empty: it cannot go on if it is cut)."""
        if self.pool is not None:
            yield "", self.pool(body)
            return
        if self._client is None:
            self._client = httpx.AsyncClient(timeout=httpx.Timeout(10, read=120), trust_env=False)
        key = self.settings.worker_key
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        if name:
            asked = self._client.stream(
                "GET", f"{worker}/v1/prefill/{name}", params={"start": received}, headers=headers
            )
        else:
            asked = self._client.stream("POST", f"{worker}/v1/prefill", json=body, headers=headers)
        async with asked as answer:
            if answer.status_code != 200:
                text = (await answer.aread())[:500].decode(errors="replace")
                raise StateError(f"{worker} answered {answer.status_code}: {text}")
            yield answer.headers.get("x-transfer", ""), answer.aiter_raw()

    def _checked(self, state: State, ids: tuple[int, ...]) -> State:
        """The state, if it is one of these ids. Raises StateError."""
        model = self.model
        state = model.accept(state, "the shipped state")
        expected = model.reader().state()
        blocks = (len(ids) - 1) // model.grid
        if (
            state.position != len(ids)
            or state.tail != ids[blocks * model.grid :]
            or state.grid != expected.grid
        ):
            raise StateError("the worker shipped the state of another text")
        return state

    async def close(self) -> None:
        """Close connections."""
        if self._client is not None:
            await self._client.aclose()
