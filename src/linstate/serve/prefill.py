"""``/v1/prefill``: read a text for another server and ship the state, layer by layer, while the later layers compute.

A transfer that was cut goes on where it stopped: ``GET /v1/prefill/{name}?start=3`` sends frame 3 and those behind it,
those that are not ready yet as they come. Finished transfers are held for a while.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.responses import StreamingResponse

from linstate.engine.jobs import Finished
from linstate.engine.jobs import Request as Job
from linstate.errors import ArgumentError, LinstateError, StateMismatchError
from linstate.serve import frames
from linstate.serve.access import tenant_of
from linstate.serve.bodies import BoundedRoute
from linstate.serve.problems import Refused
from linstate.serve.protocol import Prefill
from linstate.serve.records import new_id
from linstate.serve.service import Service
from linstate.state.state import State
from linstate.state.store import model_key
from linstate.types import LayerState, under

_HELD_SECONDS = 120.0
_HELD_BYTES = 256 * 2**20


@dataclass
class Transfer:
    """Frames that are ready, and whether more come."""

    tenant: str
    frames: list[bytes] = field(default_factory=list)
    done: bool = False
    error: LinstateError | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    finished: float = 0.0

    def add(self, frame: bytes) -> None:
        self.frames.append(frame)
        self.notify()

    def notify(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    async def ready(self) -> None:
        """Wait for the first frame, or the error in its place. Raises it."""
        while not self.frames and not self.done:
            await self.changed.wait()
        if self.error is not None and not self.frames:
            raise self.error

    async def stream(self, start: int) -> AsyncIterator[bytes]:
        """The frames from ``start`` on as they come; a stream without an end frame was cut."""
        yield frames.MAGIC
        number = start
        while True:
            while number < len(self.frames):
                yield self.frames[number]
                number += 1
            if self.done:
                return
            await self.changed.wait()


class Prefills:
    """The transfers of a server."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._held: OrderedDict[str, Transfer] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()

    def find(self, name: str, tenant: str) -> Transfer | None:
        """A transfer by name, if it is this tenant's."""
        found = self._held.get(name)
        return found if found is not None and found.tenant == tenant else None

    def begin(self, asked: Prefill, tenant: str) -> tuple[str, Transfer]:
        """Start to read. Raises StateMismatchError, Refused, ArgumentError."""
        model = self.service.model
        if asked.model != model_key(model.fingerprint):
            raise StateMismatchError(
                "this worker has another model; start it with the model of the servers that it reads for"
            )
        self.service.check_prompt(len(asked.ids))
        if max(asked.ids) >= model.decoder.config.vocab_size:
            raise ArgumentError(f"ids: must lie below {model.decoder.config.vocab_size}")
        self._forget()
        name, transfer = new_id("prefill"), Transfer(tenant)
        self._held[name] = transfer
        task = asyncio.create_task(self._read(name, transfer, asked))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return name, transfer

    def _forget(self) -> None:
        now = time.monotonic()
        total = sum(len(f) for t in self._held.values() for f in t.frames)
        for name, transfer in list(self._held.items()):
            old = transfer.done and now - transfer.finished > _HELD_SECONDS
            if old or (transfer.done and total > _HELD_BYTES):
                total -= sum(map(len, transfer.frames))
                del self._held[name]

    async def _read(self, name: str, transfer: Transfer, asked: Prefill) -> None:
        try:
            await self._ship(name, transfer, asked)
        except LinstateError as error:
            transfer.error = error
        finally:
            transfer.done, transfer.finished = True, time.monotonic()
            transfer.notify()

    async def _ship(self, name: str, transfer: Transfer, asked: Prefill) -> None:
        service, loop = self.service, asyncio.get_running_loop()
        layers = len(service.model.decoder.blocks())
        state, ids, _ = await service.begin(service.model.empty_state(), asked.ids, transfer.tenant)
        content = {"model": asked.model, "frames": layers + 2, "transfer": name}
        ready: asyncio.Queue[tuple[int, LayerState] | None] = asyncio.Queue()

        def told(number: int, part: LayerState) -> None:  # on the model's thread
            loop.call_soon_threadsafe(ready.put_nowait, (number, part))

        async def send() -> None:
            while (item := await ready.get()) is not None:
                number, part = item
                transfer.add(await asyncio.to_thread(frames.layer, number + 1, part, asked.precision))

        sender = asyncio.create_task(send())
        try:
            request = Job(
                state,
                ids,
                tenant=transfer.tenant,
                on_block=service.checkpointer(transfer.tenant, state),
                on_layer=told,
            )
            async with contextlib.aclosing(service.run(request)) as events:
                transfer.add(frames.head(0, **content))
                async for event in events:
                    if isinstance(event, Finished):
                        end = event.state
            if (
                ready.empty() and len(transfer.frames) == 1 and not _ran(state, end)
            ):  # all of it had been read before
                for number in range(layers):
                    told(number, _part(end, number))
                await asyncio.sleep(0)
            loop.call_soon(ready.put_nowait, None)
            await sender
        finally:
            sender.cancel()
        service.prefix.add(end, transfer.tenant)
        transfer.add(await asyncio.to_thread(frames.end, layers + 1, end, asked.precision))


def _ran(before: State, after: State) -> bool:
    return before.chain != after.chain


def _part(state: State, number: int) -> LayerState:
    prefix = f"layers.{number}"
    return {f"{prefix}.{name}": tensor for name, tensor in under(prefix, state.tensors).items()}


def router(service: Service) -> APIRouter:
    """The routes."""
    made = APIRouter(route_class=BoundedRoute)
    prefills = Prefills(service)

    def answer(name: str, transfer: Transfer, start: int) -> StreamingResponse:
        headers = {"x-transfer": name, "cache-control": "no-store"}
        return StreamingResponse(
            transfer.stream(start), media_type="application/vnd.linstate.frames", headers=headers
        )

    @made.post("/v1/prefill", response_class=StreamingResponse)
    async def prefill(body: Prefill, request: Request) -> StreamingResponse:
        """Read token ids and ship the state (``serve/frames.py``)."""
        name, transfer = prefills.begin(body, tenant_of(request))
        await transfer.ready()
        return answer(name, transfer, 0)

    @made.get("/v1/prefill/{name}", response_class=StreamingResponse)
    async def resume(
        name: str, request: Request, start: Annotated[int, Query(ge=0, le=10_000)] = 0
    ) -> StreamingResponse:
        """A transfer that was cut, from frame ``start`` on."""
        transfer = prefills.find(name, tenant_of(request))
        if transfer is None:
            raise Refused(404, "there is no such transfer (or it is over for too long)", code="not_found")
        return answer(name, transfer, start)

    return made
