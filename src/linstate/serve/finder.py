"""Which kept states have read about something: on the library of ``linstate.memory``, each tenant's own.

States are indexed when somebody searches, the newest first, some at a time: a conversation of a thousand turns that nobody
searches costs nothing.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from linstate.engine.language_model import LanguageModel
from linstate.errors import InputError, StateError
from linstate.state.store import Handle, StateStore

if TYPE_CHECKING:
    from linstate.memory import Embed, Library

_AT_ONCE = 64  # states that a search indexes before it looks


class Finder:
    """Finds and embeds, on a thread of its own beside the one that reads and generates.

    The model's weights are shared; its modules are copies, because embedding hangs hooks on them.
    """

    def __init__(
        self, model: LanguageModel, store: StateStore, describe: Callable[[Handle], dict[str, Any]]
    ) -> None:
        self._store, self._describe = store, describe
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

    async def find(self, tenant: str, query: str, limit: int) -> list[dict[str, Any]]:
        """States with the passage that matched, the best first. Raises InputError where LanceDB is not installed."""
        async with self._lock:
            return await asyncio.to_thread(self._find, tenant, query, limit)

    def _find(self, tenant: str, query: str, limit: int) -> list[dict[str, Any]]:
        from linstate.memory import Library

        library = self._libraries.get(tenant)
        if library is None:
            library = self._libraries[tenant] = Library(self._store, self.model, tenant=tenant)
        new = 0
        for handle in self._store.list(tenant=tenant):
            if new == _AT_ONCE:
                break
            if handle.ids_kept and handle.content and not library.index.rows(tenant, handle.content):
                new += 1
                try:
                    library.index_state(handle)
                except (InputError, StateError):  # deleted meanwhile, or it has read nothing
                    continue
        return [
            {"state": self._describe(f.handle), "passage": f.passage.text, "score": f.score}
            for f in library.find(query, limit=limit)
        ]


def _sharing(decoder: nn.Module) -> Any:
    """A copy of the modules around the same weights."""
    weights = {id(t): t for t in (*decoder.parameters(), *decoder.buffers())}
    return copy.deepcopy(decoder, weights)
