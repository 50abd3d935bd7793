"""JSON bodies: their structure is counted before anything is made of them.

A megabyte of ``[{},{},...]`` is a hundred megabytes of Python objects, and of what a validator says of each. A request
has long texts and long lists of numbers, and little else: brackets and braces outside of texts are few.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from linstate.serve.problems import HALF, Refused

MOST_OBJECTS = 50_000
"""Lists and objects in a body."""
MOST_VALUES = 2**21
"""Commas in it: token ids of a text of two million tokens."""
_SMALL = 1 << 16


def check_structure(body: bytes) -> None:
    """Raises Refused for a body of more objects or values than a request has."""
    if body.count(b"{") + body.count(b"[") <= MOST_OBJECTS and body.count(b",") <= MOST_VALUES:
        return
    objects = values = at = 0
    while True:  # what stands between texts
        begin = body.find(b'"', at)
        end = len(body) if begin < 0 else begin
        objects += body.count(b"{", at, end) + body.count(b"[", at, end)
        values += body.count(b",", at, end)
        if objects > MOST_OBJECTS or values > MOST_VALUES:
            raise Refused(
                413, f"a request may have {MOST_OBJECTS:,} lists and objects and {MOST_VALUES:,} values"
            )
        if begin < 0:
            return
        at = _after_text(body, begin + 1)


def _after_text(body: bytes, at: int) -> int:
    """The place after the quote that ends the text that begins at ``at``."""
    while (quote := body.find(b'"', at)) >= 0:
        slashes = quote
        while slashes > at and body[slashes - 1] == 0x5C:
            slashes -= 1
        if (quote - slashes) % 2 == 0:
            return quote + 1
        at = quote + 1
    return len(body)


class BoundedRequest(Request):
    """A request whose JSON is checked by :func:`check_structure` first; what is long is parsed in a thread."""

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            body = await self.body()
            if len(body) > _SMALL:
                self._json = await asyncio.to_thread(_parsed, body)
            else:
                self._json = _parsed(body)
        return self._json


def _parsed(body: bytes) -> Any:
    check_structure(body)
    found = json.loads(body)
    if b"\\ud" in body or b"\\uD" in body:  # the only way in which JSON in UTF-8 can write half of a pair
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeError:
            raise Refused(400, HALF) from None
    return found


class BoundedRoute(APIRoute):
    """A route whose requests are :class:`BoundedRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(BoundedRequest(request.scope, request.receive))

        return handle
