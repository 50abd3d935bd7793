"""One generation for a route: the events of one or several answers, and the account of their tokens."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request as HttpRequest
from starlette.responses import StreamingResponse

from linstate.engine.generation import Sampling
from linstate.engine.jobs import Constraint, Finished, Request, Token
from linstate.errors import LinstateError
from linstate.serve import problems
from linstate.serve.problems import Refused
from linstate.serve.service import Service
from linstate.state.state import State

T = TypeVar("T")
log = logging.getLogger("linstate.serve")


@dataclass
class Generate:
    """What to generate: ``ids`` behind ``state``, then an answer for each of ``samplings``.

    ``told``: its tokens one by one are wanted; 32 answers that nobody streams wake the event loop 32 times a step otherwise.
    Afterwards ``done`` holds the end of each answer, and ``cached`` the tokens of the context that were not run again.
    """

    state: State
    ids: tuple[int, ...]
    max_tokens: int
    samplings: list[Sampling]
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    constraint: Callable[[], Constraint] | None = None
    strip: bool = False
    settle: bool = False
    told: bool = True
    done: dict[int, Finished] = field(default_factory=dict)
    cached: int = 0
    context: int = 0
    seconds: float = 0.0

    async def events(self, service: Service, tenant: str) -> AsyncGenerator[tuple[int, Token | Finished]]:
        """Tokens and ends, each with the number of its answer. Left early, everything is cancelled."""
        began = time.perf_counter()
        self.context = self.state.position + len(self.ids)
        state, ids, self.cached = await service.begin(self.state, self.ids, tenant)
        if len(self.samplings) > 1 and ids:
            async for step in service.read(state, ids, tenant):
                if isinstance(step, Finished):
                    state, ids = step.state, ()
        keep = service.checkpointer(tenant, state)
        requests = [
            Request(
                state,
                ids,
                self.max_tokens,
                sampling,
                self.stop,
                self.logprobs,
                None if self.constraint is None else self.constraint(),
                tenant,
                self.settle,
                self.told,
                keep,
            )
            for sampling in self.samplings
        ]
        first = True
        async with contextlib.aclosing(_merged([service.run(r) for r in requests])) as merged:
            async for index, event in merged:
                if isinstance(event, Token) and first:
                    first = False
                    service.metrics.first.observe(time.perf_counter() - began)
                if isinstance(event, Finished):
                    self.done[index] = event
                    service.prefix.add(event.state, tenant)
                if isinstance(event, Token | Finished):
                    yield index, event
        service.metrics.cached.inc(self.cached)
        self.seconds = time.perf_counter() - began

    def usage(self) -> dict[str, Any]:
        """As chat and completions say it; ``prompt_tokens`` counts what the state had read, ``cached_tokens`` what of it was not
        run again."""
        made = sum(len(d.ids) for d in self.done.values())
        return {
            "prompt_tokens": self.context,
            "completion_tokens": made,
            "total_tokens": self.context + made,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


async def _merged(streams: list[AsyncGenerator[T]]) -> AsyncGenerator[tuple[int, T]]:
    """The items of several streams as they come; an error of one ends all."""
    if len(streams) == 1:
        async with contextlib.aclosing(streams[0]) as only:
            async for item in only:
                yield 0, item
        return
    items: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
    end = object()

    async def pump(index: int, stream: AsyncGenerator[T]) -> None:
        try:
            async with contextlib.aclosing(stream) as open_stream:
                async for item in open_stream:
                    items.put_nowait((index, item))
            items.put_nowait((index, end))
        except Exception as error:
            items.put_nowait((index, error))

    tasks = [asyncio.create_task(pump(i, s)) for i, s in enumerate(streams)]
    try:
        left = len(tasks)
        while left:
            index, item = await items.get()
            if item is end:
                left -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def unless_gone(request: HttpRequest, service: Service, work: Awaitable[T]) -> T:
    """The result of ``work``; when the client leaves, the work is cancelled."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            service.metrics.disconnects.inc()
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task
            raise Refused(499, "the client has left")
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()


def event(content: dict[str, Any] | str, name: str | None = None) -> str:
    """One server-sent event."""
    text = (
        content
        if isinstance(content, str)
        else json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    )
    return (f"event: {name}\n" if name else "") + f"data: {text}\n\n"


async def stream(service: Service, chunks: AsyncGenerator[str], *, named: bool = False) -> StreamingResponse:
    """Server-sent events. What fails before the first of them is an error response like any other."""
    first = await anext(chunks, None)

    async def body() -> AsyncGenerator[str]:
        service.metrics.streams.inc()
        ended = False
        try:
            if first is not None:
                yield first
            async for chunk in chunks:
                yield chunk
            ended = True
        except Exception as error:
            if not isinstance(error, LinstateError):
                log.error("a stream failed", exc_info=error)
            _, content, _ = problems.of_error(error)
            yield event(
                {"type": "error", **content["error"]} if named else content, "error" if named else None
            )
            ended = True
        finally:
            service.metrics.streams.dec()
            if not ended:
                service.metrics.disconnects.inc()
            await chunks.aclose()

    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(body(), media_type="text/event-stream", headers=headers)
