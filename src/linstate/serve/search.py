"""``/v1/states/search``: which kept states have read about something (``finder.py``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request

from linstate.serve.access import tenant_of
from linstate.serve.bodies import BoundedRoute
from linstate.serve.protocol import Search

if TYPE_CHECKING:
    from linstate.serve.service import Service


def router(service: Service) -> APIRouter:
    """The routes."""
    made = APIRouter(route_class=BoundedRoute)

    @made.post("/v1/states/search")
    async def search(body: Search, request: Request) -> dict[str, Any]:
        """The kept states that have read about ``query``, by words and by meaning."""
        found = await service.finder.find(tenant_of(request), body.query, body.limit)
        return {"object": "list", "data": found}

    return made
