"""The catalogue of a store: handles, models, tenants in SQLite (write-ahead log, flushed at every commit).

Every change is one transaction that holds the write lock from its begin, so processes that share the catalogue take
turns. ``refs`` says which handles need an object; an object that no handle needs may be deleted, under that lock.
Counts and bytes of a tenant are kept by triggers, so a quota costs no sum.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from linstate.errors import StateFileError
from linstate.state.store.records import Handle

VERSION = 1

_SCHEMA = """
CREATE TABLE models (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, fingerprint TEXT NOT NULL, layers TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE tenants (
    tenant TEXT PRIMARY KEY, states INTEGER NOT NULL DEFAULT 0, bytes INTEGER NOT NULL DEFAULT 0,
    max_states INTEGER, max_bytes INTEGER
) WITHOUT ROWID;
CREATE TABLE states (
    id TEXT PRIMARY KEY, tenant TEXT NOT NULL, name TEXT, kind TEXT NOT NULL,
    model TEXT NOT NULL REFERENCES models(id), position INTEGER NOT NULL, nbytes INTEGER NOT NULL,
    stored_bytes INTEGER NOT NULL, created REAL NOT NULL, expires REAL, tags TEXT NOT NULL, parent TEXT,
    object TEXT NOT NULL, ids TEXT, place BLOB, prefix BLOB, record TEXT NOT NULL,
    UNIQUE (tenant, name)
);
CREATE INDEX states_of_tenant ON states(tenant, created);
CREATE INDEX states_by_model ON states(tenant, model);
CREATE INDEX states_by_content ON states(ids, tenant) WHERE ids IS NOT NULL;
CREATE INDEX states_by_place ON states(place) WHERE place IS NOT NULL;
CREATE INDEX states_by_prefix ON states(prefix, position) WHERE prefix IS NOT NULL;
CREATE INDEX states_by_expiry ON states(expires) WHERE expires IS NOT NULL;
CREATE TABLE refs (
    object TEXT NOT NULL, tenant TEXT NOT NULL, state TEXT NOT NULL REFERENCES states(id) ON DELETE CASCADE,
    bytes INTEGER NOT NULL, PRIMARY KEY (object, tenant, state)
) WITHOUT ROWID;
CREATE INDEX refs_of_state ON refs(state);
CREATE TRIGGER counted AFTER INSERT ON states BEGIN
    INSERT INTO tenants (tenant, states) VALUES (new.tenant, 1)
        ON CONFLICT (tenant) DO UPDATE SET states = states + 1;
END;
CREATE TRIGGER discounted AFTER DELETE ON states BEGIN
    UPDATE tenants SET states = states - 1 WHERE tenant = old.tenant;
END;
CREATE TRIGGER held BEFORE INSERT ON refs
    WHEN NOT EXISTS (SELECT 1 FROM refs WHERE object = new.object AND tenant = new.tenant) BEGIN
    UPDATE tenants SET bytes = bytes + new.bytes WHERE tenant = new.tenant;
END;
CREATE TRIGGER released AFTER DELETE ON refs
    WHEN NOT EXISTS (SELECT 1 FROM refs WHERE object = old.object AND tenant = old.tenant) BEGIN
    UPDATE tenants SET bytes = bytes - old.bytes WHERE tenant = old.tenant;
END;
"""


class Catalogue:
    """Connections to one catalogue file: one for each thread, none shared with a forked process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._local = threading.local()
        self._open: list[sqlite3.Connection] = []
        self._process, self._lock = os.getpid(), threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._create()
        except (sqlite3.Error, OSError) as error:
            raise StateFileError(f"cannot open the store's catalogue {path}: {error}") from error

    def _create(self) -> None:
        with self.writing() as db:
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version == VERSION:
                return
            if version != 0:
                raise StateFileError(
                    f"{self.path}: the catalogue has format {version}, this Linstate reads format {VERSION}: "
                    + ("update Linstate" if version > VERSION else "this version is not known")
                )
            for statement in _statements(_SCHEMA):
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {VERSION}")

    @property
    def db(self) -> sqlite3.Connection:
        """This thread's connection, to read from."""
        found: sqlite3.Connection | None = getattr(self._local, "db", None)
        if found is None or self._local.process != os.getpid():
            found = sqlite3.connect(self.path, timeout=30, isolation_level=None, check_same_thread=False)
            found.row_factory = sqlite3.Row
            found.execute("PRAGMA journal_mode = WAL")
            found.execute("PRAGMA synchronous = FULL")  # a commit that returned outlives a power cut
            found.execute("PRAGMA foreign_keys = ON")
            self._local.db, self._local.process = found, os.getpid()
            with self._lock:
                if self._process != os.getpid():  # forked: the connections are the parent's
                    self._open, self._process = [], os.getpid()
                self._open.append(found)
        return found

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that holds the write lock; committed at the end, undone by an exception."""
        db = self.db
        db.execute("BEGIN IMMEDIATE")
        try:
            yield db
        except BaseException:
            db.execute("ROLLBACK")
            raise
        db.execute("COMMIT")

    def close(self) -> None:
        """Close this process's connections."""
        with self._lock:
            for db in self._open:
                db.close()
            self._open.clear()
        self._local = threading.local()


COLUMNS = (
    "states.*, models.name AS model_name, models.fingerprint, models.layers "
    "FROM states JOIN models ON models.id = states.model"
)
"""What to select for :func:`handle_of`."""


def handle_of(row: sqlite3.Row) -> Handle:
    """The handle in a row of :data:`COLUMNS`."""
    return Handle(
        id=row["id"],
        tenant=row["tenant"],
        name=row["name"],
        kind=row["kind"],
        model=row["model"],
        model_name=row["model_name"],
        position=row["position"],
        nbytes=row["nbytes"],
        stored_bytes=row["stored_bytes"],
        created=row["created"],
        expires=row["expires"],
        tags=json.loads(row["tags"]),
        parent=row["parent"],
        digest=row["object"],
        content=row["ids"],
    )


def alive() -> tuple[str, float]:
    """A condition on ``states`` for those that have not expired, and its parameter."""
    return "(expires IS NULL OR expires > ?)", time.time()


def _statements(script: str) -> Iterator[str]:
    """The statements of a script one by one: executescript would commit the transaction under way."""
    held = ""
    for line in script.splitlines(keepends=True):
        held += line
        if sqlite3.complete_statement(held):
            yield held
            held = ""
