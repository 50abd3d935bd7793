"""Beginnings of texts that clients send again: states on the grid, in memory, each tenant's own.

A client of ``/v1/chat/completions`` sends the whole conversation with every turn. What of it stands on the grid is found
here by its hash chain and not read again. A state on the grid is a function of the token ids alone, so a hit gives the
bits of a miss. States that somebody wants to keep are the store's; these are let go when memory is short.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

from linstate.state.state import State
from linstate.state.store.prefix import START, chains


class PrefixCache:
    """The least recently used go first. ``limit``: bytes of all states together."""

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes, self.hits, self.misses = limit, 0, 0, 0
        self._held: OrderedDict[tuple[str, str], State] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, ids: Sequence[int], tenant: str, grid: int) -> State | None:
        """The state on the grid that has read the most of ``ids``, and leaves at least one token to read."""
        known = list(chains(ids[: len(ids) - 1], grid))[1:]
        with self._lock:
            for chain in reversed(known):
                if (state := self._held.get((tenant, chain))) is not None:
                    self._held.move_to_end((tenant, chain))
                    self.hits += 1
                    return state
            self.misses += 1
        return None

    def add(self, state: State, tenant: str) -> None:
        """Hold what of ``state`` stands on the grid, if it has read from nothing on and is as exact as it was read."""
        key = (tenant, state.chain)
        at_grid = state.position - len(state.tail)
        plain = state.origin == 0 and state.composition is None and state.precision == "exact"
        if state.chain == START or at_grid == 0 or not plain or state.nbytes > self.limit:
            return
        bare = State(
            tensors=state.tensors,
            model=state.model,
            model_name=state.model_name,
            layers=state.layers,
            grid=state.grid,
            position=at_grid,
            chain=state.chain,
        )
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return
            self._held[key] = bare
            self.bytes += bare.nbytes
            while self.bytes > self.limit:
                _, oldest = self._held.popitem(last=False)
                self.bytes -= oldest.nbytes
