"""Responses and conversations: small JSON records beside the store, each tenant's own, in SQLite."""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from linstate.errors import QuotaError

log = logging.getLogger("linstate.serve")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS records (
    tenant TEXT NOT NULL, id TEXT NOT NULL, created REAL NOT NULL, expires REAL, body TEXT NOT NULL,
    kind TEXT NOT NULL DEFAULT '', bytes INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (tenant, id)
) WITHOUT ROWID;
"""
_LATER = """
CREATE INDEX IF NOT EXISTS records_by_expiry ON records(expires) WHERE expires IS NOT NULL;
CREATE TABLE IF NOT EXISTS held (tenant TEXT PRIMARY KEY, bytes INTEGER NOT NULL) WITHOUT ROWID;
CREATE TRIGGER IF NOT EXISTS came AFTER INSERT ON records BEGIN
    INSERT INTO held VALUES (new.tenant, new.bytes) ON CONFLICT (tenant) DO UPDATE SET bytes = bytes + new.bytes;
END;
CREATE TRIGGER IF NOT EXISTS changed AFTER UPDATE OF bytes ON records BEGIN
    UPDATE held SET bytes = bytes + new.bytes - old.bytes WHERE tenant = new.tenant;
END;
CREATE TRIGGER IF NOT EXISTS gone AFTER DELETE ON records BEGIN
    UPDATE held SET bytes = bytes - old.bytes WHERE tenant = old.tenant;
END;
"""
_LEAST = 512
"""Bytes that a record counts at least."""


def new_id(kind: str) -> str:
    """A name that nobody can guess: 128 random bits after what it is (``resp``, ``conv``, ...)."""
    return f"{kind}_{secrets.token_hex(16)}"


class Records:
    """JSON by (tenant, kind, id). A write that returned outlives a crash. One connection, one user at a time.

    A file that is damaged is set aside under another name, and an empty one begun: what rests on its records is lost, and
    nothing else.

    Args:
        quota: bytes of a tenant's records; None: no bound.
    """

    def __init__(self, path: Path, quota: int | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.quota, self._lock = quota, threading.Lock()
        try:
            self._db = _open(path)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):  # busy, no permission, no room: not its content
                raise
            aside = path.with_name(f"{path.name}.damaged-{int(time.time())}")
            for end in ("", "-wal", "-shm"):
                with contextlib.suppress(FileNotFoundError):
                    path.with_name(path.name + end).rename(aside.with_name(aside.name + end))
            log.error("%s is damaged (%s); it was set aside as %s and begun anew", path, error, aside.name)
            self._db = _open(path)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                self._db.execute("ROLLBACK")
                raise

    def put(
        self, tenant: str, kind: str, id: str, content: Mapping[str, Any], *, ttl: float | None = None
    ) -> None:
        """Write or replace a record; ``ttl`` in seconds. Raises QuotaError."""
        with self._writing() as db:
            self._put(db, tenant, kind, id, content, ttl)

    def _put(
        self,
        db: sqlite3.Connection,
        tenant: str,
        kind: str,
        id: str,
        content: Mapping[str, Any],
        ttl: float | None,
    ) -> None:
        now, body = time.time(), json.dumps(content, ensure_ascii=False)
        size = max(_LEAST, len(body.encode(errors="replace")))
        expires = None if not ttl else now + ttl
        db.execute(
            "INSERT INTO records (tenant, id, created, expires, body, kind, bytes) VALUES (?, ?, ?, ?, ?, ?, ?) "
            "ON CONFLICT (tenant, id) DO UPDATE SET expires = excluded.expires, body = excluded.body, bytes = excluded.bytes",
            (tenant, id, now, expires, body, kind, size),
        )
        if self.quota is not None and self._bytes(db, tenant) > self.quota:
            db.execute("DELETE FROM records WHERE tenant = ? AND expires <= ?", (tenant, now))
            if self._bytes(db, tenant) > self.quota:
                raise QuotaError(
                    f"responses and conversations may take {self.quota:,} bytes; delete some, or let some expire"
                )

    @staticmethod
    def _bytes(db: sqlite3.Connection, tenant: str) -> int:
        row = db.execute("SELECT bytes FROM held WHERE tenant = ?", (tenant,)).fetchone()
        return 0 if row is None else int(row[0])

    def get(self, tenant: str, kind: str, id: str) -> dict[str, Any] | None:
        """The record, if there is one of this kind and it has not expired."""
        with self._lock:
            return self._get(self._db, tenant, kind, id)

    @staticmethod
    def _get(db: sqlite3.Connection, tenant: str, kind: str, id: str) -> dict[str, Any] | None:
        row = db.execute(
            "SELECT body FROM records WHERE tenant = ? AND id = ? AND kind = ? AND (expires IS NULL OR expires > ?)",
            (tenant, id, kind, time.time()),
        ).fetchone()
        found: dict[str, Any] | None = None if row is None else json.loads(row[0])
        return found

    def change(
        self,
        tenant: str,
        kind: str,
        id: str,
        change: Callable[[dict[str, Any]], None],
        *,
        ttl: float | None = None,
    ) -> dict[str, Any] | None:
        """Read, change and write a record in one transaction: nothing that another writes meanwhile is lost.

        Returns the record as it is then; None if there is none (then nothing is written). Raises QuotaError.
        """
        with self._writing() as db:
            found = self._get(db, tenant, kind, id)
            if found is not None:
                change(found)
                self._put(db, tenant, kind, id, found, ttl)
        return found

    def delete(self, tenant: str, kind: str, id: str) -> dict[str, Any] | None:
        """Delete a record; returns what it was, None if there was none."""
        with self._writing() as db:
            found = self._get(db, tenant, kind, id)
            if found is not None:
                db.execute("DELETE FROM records WHERE tenant = ? AND id = ? AND kind = ?", (tenant, id, kind))
        return found

    def expire(self) -> int:
        """Delete what has expired; returns how many."""
        with self._writing() as db:
            return db.execute("DELETE FROM records WHERE expires <= ?", (time.time(),)).rowcount

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()


def _open(path: Path) -> sqlite3.Connection:
    """The database, of today's form. Raises sqlite3.DatabaseError where it is damaged."""
    db = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA secure_delete = ON")  # an expired text is gone, not only its entry
        if [line for (line,) in db.execute("PRAGMA quick_check(1)")] != ["ok"]:
            raise sqlite3.DatabaseError("its pages do not fit each other")
        db.executescript(_SCHEMA)
        columns = {row[1] for row in db.execute("PRAGMA table_info(records)")}
        if "kind" not in columns:  # of before kinds and quotas: the kind is what the id begins with
            db.executescript(
                "BEGIN; ALTER TABLE records ADD COLUMN kind TEXT NOT NULL DEFAULT '';"
                "ALTER TABLE records ADD COLUMN bytes INTEGER NOT NULL DEFAULT 0;"
                "UPDATE records SET kind = substr(id, 1, instr(id, '_') - 1), bytes = max(512, length(CAST(body AS BLOB)));"
                f"COMMIT; {_LATER}"
                "INSERT OR REPLACE INTO held SELECT tenant, SUM(bytes) FROM records GROUP BY tenant;"
            )
        db.executescript(_LATER)
    except BaseException:
        db.close()
        raise
    return db
