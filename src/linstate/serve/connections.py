"""Connections: a client that sends half a request, or none, keeps nobody else from being served.

An open connection costs a file and some memory; whoever opens a thousand and sends nothing has all that there are, without
a key. So a request's head has a time in which it must come, and where there are too many connections, the one that has
been without a whole request for longest is closed for the new one.
"""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from linstate.serve.settings import Settings


def most_connections(wanted: int) -> int:
    """So many as the system lets this process have open files for, besides its others."""
    try:
        import resource
    except ImportError:  # Windows counts handles otherwise
        return wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted + 256 and soft != resource.RLIM_INFINITY:
        most = wanted + 256 if hard == resource.RLIM_INFINITY else min(hard, wanted + 256)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        return max(16, min(wanted, most - 256))
    return wanted


def config_of(app: Any, settings: Settings, **options: Any) -> uvicorn.Config:
    """How uvicorn runs the application: the one way, for the command line and for tests."""
    given = {
        "host": settings.host,
        "port": settings.port,
        "log_level": "warning",
        "access_log": False,
        "http": guarded(most_connections(settings.connections), settings.idle),
        "timeout_keep_alive": round(settings.idle),
        "timeout_graceful_shutdown": round(settings.drain) + 5,
        "server_header": False,
        "lifespan": "on",
    }
    return uvicorn.Config(app, **{**given, **options})


def guarded(most: int, idle: float) -> type[asyncio.Protocol]:
    """uvicorn's protocol, with at most ``most`` connections, each at most ``idle`` seconds without a request's whole head."""
    waiting: dict[Any, None] = {}  # connections without a request under way, the one for longest first
    opened: set[Any] = set()

    class Guarded(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
        """See the module."""

        _end: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            opened.add(self)
            if len(opened) > most and waiting:
                next(iter(waiting))._close()
            waiting[self] = None
            self._end = asyncio.get_running_loop().call_later(idle, self._late)

        def connection_lost(self, exc: Exception | None) -> None:
            opened.discard(self)
            self._busy()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._under_way():
                self._busy()

        def _under_way(self) -> bool:
            cycle = self.cycle
            return cycle is not None and not cycle.response_complete

        def _busy(self) -> None:
            waiting.pop(self, None)
            if self._end is not None:
                self._end.cancel()
                self._end = None

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self in opened and not self._under_way():  # kept open for another request
                waiting[self] = None
                self._end = asyncio.get_running_loop().call_later(idle, self._late)

        def _late(self) -> None:
            if not self._under_way():
                self._close()

        def _close(self) -> None:
            opened.discard(self)
            self._busy()
            if self.transport is not None:
                self.transport.abort()

    return Guarded
