"""The index of what was read: passages in LanceDB, found by words (BM25), by vectors, or both by reciprocal rank.

A row belongs to a *content* (the object with the token ids) of a tenant, not to a handle: forks and copies are found through the
one content that they share, and what is deleted or expired in the store is never shown, whatever the index still holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from linstate.errors import ArgumentError, InputError
from linstate.memory.passages import Passage

How = Literal["hybrid", "words", "vectors"]
_APPROXIMATE_FROM = 50_000  # rows from which vectors are searched by a graph, not one by one


@dataclass(frozen=True)
class Hit:
    """A passage that matched: of which content, what it says, how well (only good for comparing within one search)."""

    content: str
    passage: Passage
    score: float


class Index:
    """Passages of all tenants with vectors of one kind, in a folder or at a URL of object storage.

    Args:
        where: folder or URL. name: of the kind of vectors, say a model key: others have tables of their own.
        dimension: of the vectors.

    Raises InputError: LanceDB is not installed.
    """

    def __init__(self, where: str | Path, *, name: str, dimension: int) -> None:
        try:
            import lancedb
            import pyarrow as pa
        except ImportError:
            raise InputError(
                "searching in a library needs the package lancedb: pip install 'linstate[memory]'"
            ) from None
        self.dimension = dimension
        schema = pa.schema(
            [
                ("tenant", pa.string()),
                ("content", pa.string()),
                ("begin", pa.int32()),
                ("end", pa.int32()),
                ("text", pa.string()),
                ("vector", pa.list_(pa.float32(), dimension)),
            ]
        )
        self._db: Any = lancedb.connect(str(where))
        self._table: Any = self._db.create_table(f"passages_{name}", schema=schema, exist_ok=True)
        self._adds, self._searchable = 0, False

    def add(
        self, tenant: str, content: str, passages: Sequence[Passage], vectors: NDArray[np.float32]
    ) -> None:
        """Add the passages of a content. Raises ArgumentError when the vectors do not fit."""
        if vectors.shape != (len(passages), self.dimension):
            raise ArgumentError(
                f"vectors: expected [{len(passages)}, {self.dimension}], one for each passage, got {list(vectors.shape)}"
            )
        self.add_rows(
            {
                "tenant": tenant,
                "content": content,
                "begin": passage.begin,
                "end": passage.end,
                "text": passage.text,
                "vector": vector,
            }
            for passage, vector in zip(passages, vectors, strict=True)
        )

    def add_rows(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows as :meth:`rows` gives them."""
        if found := list(rows):
            self._table.add(found)
            self._adds += 1
            if self._adds % 64 == 0:
                self.optimize()

    def rows(self, tenant: str, content: str) -> list[dict[str, Any]]:
        """All rows of a content, in the order of its text."""
        where = f"tenant = {_quoted(tenant)} AND content = {_quoted(content)}"
        found: list[dict[str, Any]] = self._table.search().where(where).limit(1 << 30).to_list()
        return sorted(found, key=lambda row: row["begin"])

    def remove(self, tenant: str, content: str) -> None:
        """Forget a content."""
        self._table.delete(f"tenant = {_quoted(tenant)} AND content = {_quoted(content)}")

    def clear(self, tenant: str) -> None:
        """Forget everything of a tenant."""
        self._table.delete(f"tenant = {_quoted(tenant)}")

    def optimize(self) -> None:
        """Bring the indices up to what was added, and let go of old versions."""
        from lancedb.index import FTS, Bitmap, IvfFlat

        count = self._table.count_rows()
        if count == 0:
            return
        have = {column for index in self._table.list_indices() for column in index.columns}
        if "text" not in have:
            self._table.create_index("text", config=FTS())
            self._table.create_index("tenant", config=Bitmap())
        if "vector" not in have and count >= _APPROXIMATE_FROM:
            self._table.create_index("vector", config=IvfFlat(distance_type="cosine"))
        self._table.optimize(cleanup_older_than=timedelta(minutes=10))

    def search(
        self,
        tenant: str,
        text: str,
        vector: NDArray[np.float32] | None,
        *,
        limit: int = 20,
        how: How = "hybrid",
    ) -> list[Hit]:
        """The best passages of a tenant, the best first.

        Args:
            vector: of the question ``[D]``; not needed for ``how="words"``.
            how: by words (BM25), by vectors (cosine), or both, joined by reciprocal rank (Cormack 2009, k = 60).
        """
        if how != "words" and vector is None:
            raise ArgumentError(f"search by {how} needs the question's vector")
        ranked = []
        if how != "vectors":
            ranked.append(self._by_words(tenant, text, limit))
        if how != "words":
            query = self._table.search(vector).distance_type("cosine")
            ranked.append(self._run(query, tenant, limit, "_distance"))
        scores: dict[tuple[str, int], float] = {}
        rows: dict[tuple[str, int], dict[str, Any]] = {}
        for one in ranked:
            for rank, row in enumerate(one):
                key = row["content"], row["begin"]
                rows[key] = row
                scores[key] = scores.get(key, 0.0) + 1 / (60 + rank)
        best = sorted(scores, key=lambda key: -scores[key])[:limit]
        return [
            Hit(key[0], Passage(key[1], rows[key]["end"], rows[key]["text"]), scores[key]) for key in best
        ]

    def _by_words(self, tenant: str, text: str, limit: int) -> list[dict[str, Any]]:
        from lancedb.query import MatchQuery

        if not any(character.isalnum() for character in text):
            return []
        if not self._searchable:
            self.optimize()
            self._searchable = any("text" in index.columns for index in self._table.list_indices())
            if not self._searchable:  # there are no rows
                return []
        query = self._table.search(MatchQuery(text, "text"), query_type="fts")
        return self._run(query, tenant, limit, "_score")

    def _run(self, query: Any, tenant: str, limit: int, measure: str) -> list[dict[str, Any]]:
        columns = ["content", "begin", "end", "text", measure]
        found: list[dict[str, Any]] = (
            query.where(f"tenant = {_quoted(tenant)}", prefilter=True).select(columns).limit(limit).to_list()
        )
        return found


def _quoted(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
