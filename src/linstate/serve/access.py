"""Who asks, and what is let in: keys, hosts, sizes, and the log. One ASGI layer around the app."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import sys
import time
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from linstate.serve import problems
from linstate.serve.keys import bearer
from linstate.serve.settings import LOOPBACK
from linstate.state.store.store import DEFAULT

if TYPE_CHECKING:
    from linstate.serve.service import Service

log = logging.getLogger("linstate.serve")
_FREE = ("/", "/page.js", "/page.css", "/health", "/favicon.ico")
_SAFE = ("GET", "HEAD", "OPTIONS")
_HOST = re.compile(r"([A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?")
"""A Host header: a name or an address, and a port. Nothing else, as nothing else has one meaning for everybody who reads it."""
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "content-security-policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'",
}


def tenant_of(request: Request) -> str:
    """Whose request it is; set by :class:`Access`."""
    found: str = request.scope["state"]["tenant"]
    return found


class Access:
    """Lets a request in, or answers it: 401 without a key, 403 from a foreign page, 413 when it is too long.

    A server on loopback is within reach of every page that the browser on this machine shows. So the Host header must be
    one of ours (a page cannot rebind its name to loopback), and what changes anything must come from our own page, or from
    no page at all (no Origin header).
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service
        settings = service.settings
        self.hosts = {name.lower() for name in (*LOOPBACK, "[::1]", settings.host, *settings.names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status, sent = time.perf_counter(), 500, 0
        request = Request(scope)
        name = secrets.token_hex(8)

        async def answer(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = {**HEADERS, "x-request-id": name}
                message["headers"] = [
                    *message["headers"],
                    *((k.encode(), v.encode()) for k, v in extra.items()),
                ]
            else:
                sent += len(message.get("body", b""))
            await send(message)

        refused = self._refused(request)
        taken, whole = 0, False  # of the body
        limit = self.service.settings.max_body

        async def bounded() -> Message:
            nonlocal taken, whole
            if whole:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), self.service.settings.idle)
            except TimeoutError:
                raise problems.Refused(408, "the rest of the request did not come") from None
            whole = not message.get("more_body", False)
            taken += len(message.get("body", b"")) if message["type"] == "http.request" else 0
            if taken > limit:
                raise problems.Refused(413, f"a request may have {limit:,} bytes")
            return message

        started = False

        async def noting(message: Message) -> None:
            nonlocal started
            started = True
            await answer(message)

        try:
            if refused is not None:
                await refused(scope, receive, answer)
            else:
                await self.app(scope, bounded, noting)
        except Exception as error:
            log.error("failed: %s", name, exc_info=error)
            if not started:
                status, content, _ = problems.of_error(error)
                await JSONResponse(content, status)(scope, receive, answer)
        finally:
            seconds = time.perf_counter() - began
            route = getattr(scope.get("route"), "path", "other")
            self.service.metrics.requests.labels(route, str(status)).inc()
            self.service.metrics.seconds.labels(route).observe(seconds)
            log.info(
                "request",
                extra={
                    "fields": {
                        "id": name,
                        "method": scope["method"],
                        "route": route,
                        "status": status,
                        "seconds": round(seconds, 4),
                        "in": taken,
                        "out": sent,
                        "tenant": scope["state"].get("tenant"),
                    }
                },
            )

    def _refused(self, request: Request) -> JSONResponse | None:
        scope = request.scope
        scope.setdefault("state", {})
        hosts = request.headers.getlist("host")
        named = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
        if named is None or named[1].lower() not in self.hosts:
            shown = ", ".join(hosts)[:100]
            return _error(403, f"this server does not answer to the host {shown!r}; name it with --name")
        origin = request.headers.get("origin")
        if (
            origin is not None
            and scope["method"] not in _SAFE
            and origin != f"{scope['scheme']}://{hosts[0]}"
        ):
            return _error(403, "a page of another site may not do this")
        length = request.headers.get("content-length", "0")
        if not re.fullmatch("[0-9]{1,15}", length) or int(length) > self.service.settings.max_body:
            return _error(413, f"a request may have {self.service.settings.max_body:,} bytes")
        keys = self.service.keys
        if keys is None:
            scope["state"]["tenant"] = DEFAULT
            return None
        # The path as it is routed. That of `request.url` is made of the Host header, too, which the client writes.
        if scope["path"] in _FREE and scope["method"] in _SAFE:
            return None
        key = bearer(request.headers)
        tenant = None if key is None else keys.tenant(key)
        if tenant is None:
            said = _error(401, "give an API key: Authorization: Bearer ls-...", code="invalid_api_key")
            said.headers["www-authenticate"] = "Bearer"
            return said
        scope["state"]["tenant"] = tenant
        return None


def _error(status: int, message: str, *, code: str | None = None) -> JSONResponse:
    return JSONResponse(problems.body(message, status, code=code), status)


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            fields["error"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


def log_to_stderr(kind: str) -> None:
    """Send this server's log to standard error: "json", "text" or "off"."""
    log.handlers.clear()
    log.propagate = False
    log.setLevel(logging.INFO if kind != "off" else logging.CRITICAL + 1)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonLines()
        if kind == "json"
        else logging.Formatter("%(asctime)s %(levelname)s %(message)s %(fields)s", defaults={"fields": ""})
    )
    log.addHandler(handler)
