"""The longest stored beginning of a text, looked up in the catalogue; and if there is none, why."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

from linstate.state.store import prefix
from linstate.state.store.catalogue import COLUMNS, Catalogue, alive, handle_of
from linstate.state.store.records import Handle, Match

_AT_ONCE = 500  # places in one query


class Lookup:
    """Looks texts up: which of their places have states, the farthest first; there, which of their keys."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        self._counts = {"hits": 0, "misses": 0, "tokens": 0}
        self._lock = threading.Lock()

    def longest(self, ids: Sequence[int], *, tenant: str, model: str, grid: int) -> Match:
        """As ``StateStore.longest_prefix``; ``model`` is a model key."""
        places = [prefix.place(tenant, model, chain) for chain in prefix.chains(ids, grid)]
        deepest = None
        for block in self._known(places):
            deepest = block if deepest is None else deepest
            keys = prefix.keys(places[block], ids[block * grid : (block + 1) * grid])
            living, now = alive()
            row = self.catalogue.db.execute(
                f"SELECT {COLUMNS} WHERE prefix IN ({','.join('?' * len(keys))}) AND {living} "
                "ORDER BY position DESC LIMIT 1",
                (*keys, now),
            ).fetchone()
            if row is not None:
                handle = handle_of(row)
                self._count(hits=1, tokens=handle.position)
                return Match(handle, handle.position, _why_not_more(len(ids), handle, deepest, grid))
        self._count(misses=1)
        return Match(None, 0, self._why_not(tenant, model, deepest, grid))

    def stats(self) -> dict[str, int]:
        """Hits, misses, and tokens that need not be read again, of this process."""
        with self._lock:
            return dict(self._counts)

    def _count(self, **counts: int) -> None:
        with self._lock:
            for name, count in counts.items():
                self._counts[name] += count

    def _known(self, places: Sequence[bytes]) -> Iterator[int]:
        """Which places have a state, the farthest first."""
        living, now = alive()
        for end in range(len(places), 0, -_AT_ONCE):
            begin = max(0, end - _AT_ONCE)
            values = [x for n in range(begin, end) for x in (n, places[n])]
            rows = self.catalogue.db.execute(
                f"WITH asked(n, at) AS (VALUES {','.join(['(?,?)'] * (end - begin))}) SELECT n FROM asked "
                f"WHERE EXISTS (SELECT 1 FROM states WHERE place = at AND {living}) ORDER BY n DESC",
                (*values, now),
            ).fetchall()
            yield from (row["n"] for row in rows)

    def _why_not(self, tenant: str, model: str, deepest: int | None, grid: int) -> str:
        if deepest:
            return (
                f"stored states share the first {deepest * grid:,} tokens, but all go on differently within the {grid} behind "
                "them, and none stands at a checkpoint before"
            )
        living, now = alive()
        one = self.catalogue.db.execute
        if not one(f"SELECT 1 FROM states WHERE tenant = ? AND {living} LIMIT 1", (tenant, now)).fetchone():
            return "nothing is stored"
        if not one(
            f"SELECT 1 FROM states WHERE tenant = ? AND model = ? AND {living} LIMIT 1", (tenant, model, now)
        ).fetchone():
            return "no state of this model is stored, only of others"
        return "no stored state has read a beginning of this text and nothing else, and none stands at a checkpoint in it"


def _why_not_more(tokens: int, hit: Handle, deepest: int | None, grid: int) -> str:
    rest = tokens - hit.position
    if rest == 0:
        return "the whole text was read before"
    if deepest is not None and deepest > hit.position // grid:
        return f"{rest:,} tokens are new: other stored states share the first {deepest * grid:,} tokens, but go on differently"
    return f"{rest:,} tokens are new: no stored state has read more than the first {hit.position:,} and nothing else"
