"""Responses and conversations: small JSON records beside the store, each tenant's own, in SQLite."""

from __future__ import annotations

import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_SCHEMA = """
CREATE TABLE IF NOT EXISTS records (
    tenant TEXT NOT NULL, id TEXT NOT NULL, created REAL NOT NULL, expires REAL, body TEXT NOT NULL,
    PRIMARY KEY (tenant, id)
) WITHOUT ROWID;
"""


def new_id(kind: str) -> str:
    """A name that nobody can guess: 128 random bits behind what it is (``resp``, ``conv``, ...)."""
    return f"{kind}_{secrets.token_hex(16)}"


class Records:
    """JSON by (tenant, id). A write that returned outlives a crash. One connection, one user at a time."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.executescript(_SCHEMA)
        self._lock = threading.Lock()

    def put(self, tenant: str, id: str, content: Mapping[str, Any], *, ttl: float | None = None) -> None:
        """Write or replace a record; ``ttl`` in seconds."""
        now = time.time()
        row = (tenant, id, now, None if not ttl else now + ttl, json.dumps(content, ensure_ascii=False))
        with self._lock:
            self._db.execute("INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?, ?)", row)

    def get(self, tenant: str, id: str) -> dict[str, Any] | None:
        """The record, if there is one and it has not expired."""
        with self._lock:
            row = self._db.execute(
                "SELECT body FROM records WHERE tenant = ? AND id = ? AND (expires IS NULL OR expires > ?)",
                (tenant, id, time.time()),
            ).fetchone()
        found: dict[str, Any] | None = None if row is None else json.loads(row[0])
        return found

    def delete(self, tenant: str, id: str) -> bool:
        """Delete a record; False if there was none."""
        with self._lock:
            done = self._db.execute("DELETE FROM records WHERE tenant = ? AND id = ?", (tenant, id)).rowcount
        return done > 0

    def expire(self) -> int:
        """Delete what has expired; returns how many."""
        with self._lock:
            return self._db.execute("DELETE FROM records WHERE expires <= ?", (time.time(),)).rowcount

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()
