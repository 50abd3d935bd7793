"""``/v1/states/search``: which kept states have read about something. On the library of ``linstate.memory``, each tenant's own.

States are indexed when somebody searches, the newest first, some at a time: a conversation of a thousand turns that nobody
searches costs nothing.
"""

from __future__ import annotations

import asyncio
import copy
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from torch import nn

from linstate.engine.language_model import LanguageModel
from linstate.errors import InputError, StateError
from linstate.serve.access import tenant_of
from linstate.serve.bodies import BoundedRoute
from linstate.serve.protocol import Search

if TYPE_CHECKING:
    from linstate.memory import Embed, Library
    from linstate.serve.service import Service

_AT_ONCE = 64  # states that a search indexes before it looks


class Finder:
    """Finds and embeds, on a thread of its own beside the one that reads and generates.

    The model's weights are shared; its modules are copies, because embedding hangs hooks on them.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = copy.copy(model)
        self.model.decoder = _sharing(model.decoder)
        self._embed: Embed | None = None
        self._libraries: dict[str, Library] = {}
        self._lock = asyncio.Lock()

    async def embed(self, texts: list[str]) -> list[list[float]]:
        """Vectors of length 1: means of hidden states, what all texts have in common removed."""
        async with self._lock:
            return (await asyncio.to_thread(self._embedder(), texts)).tolist()

    def _embedder(self) -> Embed:
        from linstate.memory import hidden_states

        if self._embed is None:
            self._embed = hidden_states(self.model)
        return self._embed

    async def find(self, service: Service, tenant: str, query: str, limit: int) -> list[dict[str, Any]]:
        """States with the passage that matched, the best first. Raises InputError where LanceDB is not installed."""
        async with self._lock:
            return await asyncio.to_thread(self._find, service, tenant, query, limit)

    def _find(self, service: Service, tenant: str, query: str, limit: int) -> list[dict[str, Any]]:
        from linstate.memory import Library

        library = self._libraries.get(tenant)
        if library is None:
            library = self._libraries[tenant] = Library(service.store, self.model, tenant=tenant)
        new = 0
        for handle in service.store.list(tenant=tenant):
            if new == _AT_ONCE:
                break
            if handle.ids_kept and handle.content and not library.index.rows(tenant, handle.content):
                new += 1
                try:
                    library.index_state(handle)
                except (InputError, StateError):  # deleted meanwhile, or it has read nothing
                    continue
        return [
            {"state": service.describe(f.handle), "passage": f.passage.text, "score": f.score}
            for f in library.find(query, limit=limit)
        ]


def _sharing(decoder: nn.Module) -> Any:
    """A copy of the modules around the same weights."""
    weights = {id(t): t for t in (*decoder.parameters(), *decoder.buffers())}
    return copy.deepcopy(decoder, weights)


def router(service: Service) -> APIRouter:
    """The routes."""
    made = APIRouter(route_class=BoundedRoute)

    @made.post("/v1/states/search")
    async def search(body: Search, request: Request) -> dict[str, Any]:
        """The kept states that have read about ``query``, by words and by meaning."""
        found = await service.finder.find(service, tenant_of(request), body.query, body.limit)
        return {"object": "list", "data": found}

    return made
