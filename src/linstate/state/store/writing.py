"""What a put does: objects first, then the handle in one transaction; what that refuses leaves nothing behind."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

from linstate.errors import QuotaError, StateError
from linstate.state.store.catalogue import Catalogue, alive
from linstate.state.store.checks import over_quota
from linstate.state.store.objects import Objects


class Writing:
    """Objects and handles of a store, under its tenants' quotas.

    Args:
        usage: handles and bytes of a tenant, and its quota. forget: told of an object that is gone.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        objects: Objects,
        usage: Callable[[str], Mapping[str, int | None]],
        forget: Callable[[str], None],
    ) -> None:
        self.catalogue, self.objects, self.usage, self.forget = catalogue, objects, usage, forget

    def write(self, blobs: Mapping[str, bytes], tenant: str) -> dict[str, bytes]:
        """Write the objects that are not stored, if the tenant's quota lets it have them and one handle more.

        Returns those that were written: if no handle comes to need them, :meth:`free` takes them away again.
        """
        new = {name: blob for name, blob in blobs.items() if not self._has(name, tenant)}
        size = sum(len(blob) for blob in new.values())
        if over_quota(self.usage(tenant), size, handles=1):
            with self.catalogue.writing() as db:
                self._expire(db, tenant)
            if over := over_quota(self.usage(tenant), size, handles=1):
                raise QuotaError(f"tenant {tenant!r}: {over}")
        try:
            for name, blob in new.items():
                self.objects.write(name, blob)
        except BaseException:
            with suppress(Exception):  # else the next collection takes them
                self.free(new)
            raise
        return new

    def free(self, names: Iterable[str]) -> None:
        """Delete objects that no handle needs, under the write lock; others stay."""
        with self.catalogue.writing() as db:
            for name in names:
                if db.execute("SELECT 1 FROM refs WHERE object = ? LIMIT 1", (name,)).fetchone() is None:
                    self.objects.delete(name)
                    self.forget(name)

    def still_there(self, db: sqlite3.Connection, blobs: Mapping[str, bytes]) -> None:
        """Under the write lock: an object without a handle may have been collected since it was looked at."""
        for name, blob in blobs.items():
            known = db.execute("SELECT 1 FROM refs WHERE object = ? LIMIT 1", (name,)).fetchone()
            if known is None and not self.objects.exists(name):
                self.objects.write(name, blob)

    def insert(
        self, db: sqlite3.Connection, row: dict[str, Any], *, move: bool, sizes: Mapping[str, int]
    ) -> None:
        """Enter a handle and what it needs. Raises StateError, QuotaError."""
        tenant = row["tenant"]
        if row["name"] is not None:
            if move:
                db.execute(
                    "UPDATE states SET name = NULL WHERE tenant = ? AND name = ?", (tenant, row["name"])
                )
            self.free_name(db, tenant, row["name"], but="")
        columns = ", ".join(row)
        db.execute(
            f"INSERT INTO states ({columns}) VALUES ({', '.join('?' * len(row))})", tuple(row.values())
        )
        for name, size in sizes.items():
            db.execute("INSERT INTO refs VALUES (?, ?, ?, ?)", (name, tenant, row["id"], size))
        if over_quota(self.usage(tenant), 0):
            self._expire(db, tenant)
        if over := over_quota(self.usage(tenant), 0):
            raise QuotaError(f"tenant {tenant!r}: {over}")

    def free_name(self, db: sqlite3.Connection, tenant: str, name: str, *, but: str) -> None:
        """Make sure that no other living state has the name. Raises StateError."""
        living, now = alive()
        db.execute(
            f"UPDATE states SET name = NULL WHERE tenant = ? AND name = ? AND NOT {living}",
            (tenant, name, now),
        )
        if db.execute(
            "SELECT 1 FROM states WHERE tenant = ? AND name = ? AND id != ?", (tenant, name, but)
        ).fetchone():
            raise StateError(
                f"there is a state named {name!r} already; choose another name, or delete or rename that one"
            )

    def _has(self, name: str, tenant: str) -> bool:
        """Whether the tenant has the object stored. What only others have is written again, so that nobody learns from the time
        that a put takes what others have read."""
        query = "SELECT 1 FROM refs WHERE object = ? AND tenant = ? LIMIT 1"
        mine = self.catalogue.db.execute(query, (name, tenant)).fetchone()
        return mine is not None and self.objects.exists(name)

    def _expire(self, db: sqlite3.Connection, tenant: str) -> None:
        living, now = alive()
        db.execute(f"DELETE FROM states WHERE tenant = ? AND NOT {living}", (tenant, now))
