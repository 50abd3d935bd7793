"""A store of states: put, get, fork, find the longest beginning; nothing acknowledged is ever lost.

The order of writing is what makes it safe to be killed at any moment. A state's objects are on disk before the
transaction that gives it a handle begins; within that transaction, which holds the catalogue's write lock, an object that no
handle refers to yet is looked at once more, and written again should a collection have taken it. Collections delete objects
only under the same lock, and only those without a handle. So at every moment every handle's objects are there.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from linstate.errors import (
    ArgumentError,
    InputError,
    StateFileError,
    StateMismatchError,
    StateNotFoundError,
)
from linstate.files import write_atomically
from linstate.models.fingerprint import Fingerprint
from linstate.models.state_table import StateTable
from linstate.state.precision import Precision
from linstate.state.state import State
from linstate.state.store import prefix, records
from linstate.state.store.catalogue import COLUMNS, Catalogue, alive, handle_of
from linstate.state.store.checks import bound_key, check_name, expiry, tags_json
from linstate.state.store.lookup import Lookup
from linstate.state.store.objects import digest, open_objects
from linstate.state.store.records import Handle, Match, model_key
from linstate.state.store.tiers import Tiers
from linstate.state.store.upkeep import Collected, Verified, collect, verify
from linstate.state.store.writing import Writing
from linstate.types import LayerState

DEFAULT = "default"
_COUNTED = ("puts", "objects_written", "objects_shared", "bytes_written", "objects_read", "bytes_read")
_KEEP: Any = object()  # "leave as it is", where None means something


class StateStore:
    """Many states, each under a handle; safe to share between threads and processes of one machine.

    Args:
        where: a folder, or a URL of object storage (``s3://``, ``gs://``, ``az://``, ``file://``; extra ``store``).
        catalogue: the SQLite file, on a local disk. Default: in the folder; a URL needs it named.
        memory_bytes: tensors kept at hand in memory. device_bytes: the same on each accelerator.
        max_states, max_bytes: quota of each tenant that has none of its own (:meth:`set_quota`); None: no bound.

    Raises:
        InputError: it cannot be opened. StateFileError: the catalogue is of another format or damaged.

    >>> from linstate import LanguageModel
    >>> import tempfile
    >>> model = LanguageModel.from_pretrained("pocket")
    >>> store = StateStore(tempfile.mkdtemp())
    >>> handle = store.put(model.read("colour: green\\n"), name="notes")
    >>> store.load("notes").position == handle.position
    True
    """

    def __init__(
        self,
        where: str | Path,
        *,
        catalogue: str | Path | None = None,
        memory_bytes: int = 256 * 2**20,
        device_bytes: int = 2**30,
        max_states: int | None = None,
        max_bytes: int | None = None,
    ) -> None:
        self.where = str(where)
        if catalogue is None:
            if "://" in self.where:
                raise InputError(
                    f"a store in object storage ({where}) needs a file on a local disk for its catalogue: name one "
                    "(catalogue=..., or --catalogue)"
                )
            catalogue = Path(where) / "catalogue.sqlite"
        self.objects = open_objects(self.where)
        self.catalogue = Catalogue(Path(catalogue))
        self._lookup = Lookup(self.catalogue)
        self._writing = Writing(self.catalogue, self.objects, self.usage, self._forget)
        self.tiers = Tiers(memory_bytes, device_bytes)
        self._quota = max_states, max_bytes
        self._counts = dict.fromkeys(_COUNTED, 0)
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the catalogue; the store opens it again when it is used."""
        self.catalogue.close()

    # Writing

    def put(
        self,
        state: State,
        *,
        tenant: str = DEFAULT,
        name: str | None = None,
        move: bool = False,
        tags: Mapping[str, str] | None = None,
        ttl: float | None = None,
        ids: Sequence[int] | None = None,
        parent: str | None = None,
        precision: Precision = "exact",
        kind: str = "state",
    ) -> Handle:
        """Store a state; when this returns, the state outlives a crash.

        Args:
            name: unique for the tenant. move: if another state has the name, take it from that one.
            ttl: seconds until it expires; None: never.
            ids: all token ids that it has read, to keep for search; ``state.tokens`` where the state has them.
            parent: reference of the state that it came from.
            precision: "exact", or "bf16" or "int8", which :meth:`longest_prefix` does not find.

        Raises:
            StateError: the name is taken. QuotaError: the tenant's quota is used up. ArgumentError: ``ids`` are not as
            many as the state's position, a number is not finite, or a name or tenant is no printable text.
        """
        check_name(tenant, "tenant")
        if name is not None:
            check_name(name, "name")
        ids = state.tokens if ids is None else ids
        if ids is not None and len(ids) != state.position:
            raise ArgumentError(
                f"ids: expected all {state.position:,} token ids that the state has read, got {len(ids):,}"
            )
        came_from = None if parent is None else self.get(parent, tenant=tenant).id
        blob, error = records.pack_tensors(state.tensors, precision)
        blobs = {digest(blob): blob}
        tensors_name, ids_name = digest(blob), None
        if ids is not None:
            packed = records.pack_ids(ids)
            ids_name = digest(packed)
            blobs[ids_name] = packed
        new = self._writing.write(blobs, tenant)
        self._count(
            objects_written=len(new),
            bytes_written=sum(map(len, new.values())),
            objects_shared=len(blobs) - len(new),
        )
        model = model_key(state.model)
        at = tail = None
        if precision == "exact" and prefix.findable(state):
            at = prefix.place(tenant, model, state.chain)
            tail = prefix.key(at, state.tail)
        now = time.time()
        row: dict[str, Any] = {
            "id": secrets.token_hex(16),
            "tenant": tenant,
            "name": name,
            "kind": kind,
            "model": model,
            "position": state.position,
            "nbytes": state.nbytes,
            "stored_bytes": len(blob),
            "created": now,
            "expires": expiry(ttl, now),
            "tags": tags_json(tags),
            "parent": came_from,
            "object": tensors_name,
            "ids": ids_name,
            "place": at,
            "prefix": tail,
            "record": records.record_of(state, precision, error),
        }
        try:
            with self.catalogue.writing() as db:
                self._writing.still_there(db, blobs)
                db.execute(
                    "INSERT OR IGNORE INTO models VALUES (?, ?, ?, ?)",
                    (model, state.model_name, json.dumps(asdict(state.model)), json.dumps(state.layers)),
                )
                self._writing.insert(db, row, move=move, sizes={name: len(b) for name, b in blobs.items()})
        except BaseException:
            with suppress(Exception):  # else the next collection takes them
                self._writing.free(new)
            raise
        if precision == "exact":
            device = _device_of(state.tensors)
            self.tiers.add(tensors_name, device, {part: _own(t) for part, t in state.tensors.items()})
        self._count(puts=1)
        return self._written(row["id"])

    def checkpoint(self, state: State, *, tenant: str = DEFAULT, ttl: float | None = None) -> Handle:
        """Store a state on the way through a text, unless one that has read the same is there already.

        The one that is there lives as long as the longer of both would.
        """
        if prefix.findable(state):
            at = prefix.place(tenant, model_key(state.model), state.chain)
            living, now = alive()
            with self.catalogue.writing() as db:
                row = db.execute(
                    f"SELECT id, expires FROM states WHERE prefix = ? AND {living} LIMIT 1",
                    (prefix.key(at, state.tail), now),
                ).fetchone()
                if row is not None:
                    expires = expiry(ttl, now)
                    if row["expires"] is not None and (expires is None or expires > row["expires"]):
                        db.execute("UPDATE states SET expires = ? WHERE id = ?", (expires, row["id"]))
            if row is not None:
                return self._written(row["id"])
        return self.put(state, tenant=tenant, ttl=ttl, kind="checkpoint")

    def fork(
        self, ref: str, *, tenant: str = DEFAULT, name: str | None = None, ttl: float | None = None
    ) -> Handle:
        """A second handle of the same state, whatever the state's size: no byte of it is touched.

        Raises as :meth:`get` and :meth:`put`.
        """
        if name is not None:
            check_name(name, "name")
        now = time.time()
        with self.catalogue.writing() as db:
            source = self._row(ref, tenant)
            row = {
                key: source[key]
                for key in source.keys()  # noqa: SIM118 - a Row iterates over values
                if key not in ("model_name", "fingerprint", "layers")
            }
            row |= {"id": secrets.token_hex(16), "name": name, "kind": "state", "created": now}
            row |= {"expires": expiry(ttl, now), "parent": source["id"]}
            sizes = {
                ref["object"]: ref["bytes"]
                for ref in db.execute("SELECT object, bytes FROM refs WHERE state = ?", (source["id"],))
            }
            self._writing.insert(db, row, move=False, sizes=sizes)
        return self._written(row["id"])

    def update(
        self,
        ref: str,
        *,
        tenant: str = DEFAULT,
        name: str | None = _KEEP,
        ttl: float | None = _KEEP,
        tags: Mapping[str, str] = _KEEP,
    ) -> Handle:
        """Change a handle's name, time to live (from now; None: for ever) or tags; what is not given stays."""
        changes: dict[str, Any] = {}
        if name is not _KEEP:
            if name is not None:
                check_name(name, "name")
            changes["name"] = name
        if ttl is not _KEEP:
            changes["expires"] = expiry(ttl, time.time())
        if tags is not _KEEP:
            changes["tags"] = tags_json(tags)
        with self.catalogue.writing() as db:
            row = self._row(ref, tenant)
            if changes.get("name") is not None:
                self._writing.free_name(db, tenant, changes["name"], but=row["id"])
            for column, value in changes.items():
                db.execute(f"UPDATE states SET {column} = ? WHERE id = ?", (value, row["id"]))
        return self._written(row["id"])

    def delete(self, ref: str, *, tenant: str = DEFAULT) -> Handle:
        """Delete a handle, and its bytes if no other handle needs them; returns what it was."""
        with self.catalogue.writing() as db:
            handle = handle_of(self._row(ref, tenant))
            needed = [
                row["object"] for row in db.execute("SELECT object FROM refs WHERE state = ?", (handle.id,))
            ]
            db.execute("DELETE FROM states WHERE id = ?", (handle.id,))
        self._writing.free(needed)
        return handle

    def set_quota(self, tenant: str, *, max_states: int | None = None, max_bytes: int | None = None) -> None:
        """Bound a tenant's handles, and the bytes of its distinct objects; None: the store's own bound."""
        check_name(tenant, "tenant")
        with self.catalogue.writing() as db:
            db.execute(
                "INSERT INTO tenants (tenant, max_states, max_bytes) VALUES (?, ?, ?) ON CONFLICT (tenant) "
                "DO UPDATE SET max_states = excluded.max_states, max_bytes = excluded.max_bytes",
                (tenant, max_states, max_bytes),
            )

    # Reading

    def get(self, ref: str, *, tenant: str = DEFAULT) -> Handle:
        """The handle with this id, name, or unambiguous beginning of an id (8 digits or more).

        Raises StateNotFoundError: there is none, it has expired, or it is another tenant's (which looks the same).
        """
        return handle_of(self._row(ref, tenant))

    def list(
        self,
        *,
        tenant: str | None = DEFAULT,
        model: str | None = None,
        kind: str | None = "state",
        tags: Mapping[str, str] | None = None,
        limit: int | None = None,
        before: float | None = None,
    ) -> Iterator[Handle]:
        """A tenant's handles (None: of all tenants), newest first.

        Args:
            model: only of the model with this :func:`model_key`. kind: "state", "checkpoint", None for both.
            tags: only with all of these. limit: at most so many. before: only created before this time.
        """
        living, now = alive()
        where, values = [living], list[Any]([now])
        wanted: list[tuple[str, Any]] = [("states.tenant = ?", tenant), ("states.model = ?", model)]
        wanted += [("states.kind = ?", kind), ("states.created < ?", before)]
        for condition, value in wanted:
            if value is not None:
                where.append(condition)
                values.append(value)
        for tag, value in (tags or {}).items():
            where.append("EXISTS (SELECT 1 FROM json_each(states.tags) WHERE key = ? AND value = ?)")
            values += [tag, value]
        values.append(-1 if limit is None else limit)
        rows = self.catalogue.db.execute(
            f"SELECT {COLUMNS} WHERE {' AND '.join(where)} ORDER BY states.created DESC LIMIT ?", values
        )
        for row in rows.fetchall():
            yield handle_of(row)

    def load(
        self,
        ref: str,
        *,
        tenant: str = DEFAULT,
        model: Fingerprint | None = None,
        device: str = "cpu",
        replay: bool = True,
        tokens: bool = True,
    ) -> State:
        """The state behind a handle; its tensors come from the device's tier, from memory, or from storage.

        Args:
            model: the fingerprint that it must have. device: where its tensors shall be.
            replay: keep the record of a generation under way, to go on from it to the bit; without it the state goes on as
                one that has just read its tokens, which is what a prefix hit wants.
            tokens: with its token ids, where they are kept.

        Raises:
            StateNotFoundError: as :meth:`get`. StateMismatchError: it belongs to another model.
            StateFileError: storage lost or changed its bytes.
        """
        row = self._row(ref, tenant)
        owner = Fingerprint(**json.loads(row["fingerprint"]))
        if model is not None and (differ := owner.differences(model)):
            raise StateMismatchError(
                f"{ref}: this state was made by the model {row['model_name']!r}, whose {' and '.join(differ)} differ "
                "from the model in use; load that model, or read the text again with this one"
            )
        state = records.state_of(
            row["record"],
            tensors=self._tensors(row["object"], device),
            model=owner,
            model_name=row["model_name"],
            layers=json.loads(row["layers"]),
            position=row["position"],
            tokens=records.unpack_ids(self._read(row["ids"])) if tokens and row["ids"] else None,
        )
        return state if replay or not state.calls else replace(state, calls=(), rows=1)

    def ids(self, ref: str, *, tenant: str = DEFAULT) -> tuple[int, ...] | None:
        """All token ids that a state has read, if they were kept, else None."""
        row = self._row(ref, tenant)
        return records.unpack_ids(self._read(row["ids"])) if row["ids"] else None

    def with_content(self, content: str, *, tenant: str = DEFAULT) -> Handle | None:
        """The handle of this tenant that has read a content (``Handle.content``): one with a name, else the newest."""
        living, now = alive()
        row = self.catalogue.db.execute(
            f"SELECT {COLUMNS} WHERE ids = ? AND tenant = ? AND {living} ORDER BY states.name IS NULL, created DESC LIMIT 1",
            (content, tenant, now),
        ).fetchone()
        return None if row is None else handle_of(row)

    def longest_prefix(
        self, ids: Sequence[int], *, tenant: str = DEFAULT, model: Fingerprint | str, grid: int
    ) -> Match:
        """The stored state of this tenant and model that has read the longest beginning of ``ids``, and nothing else.

        Load it with ``replay=False``, feed ``ids[match.length:]``, and the result is bit-identical to reading all of
        ``ids``. A state that ends where the text ends is given only if it can go on from there without another token.

        Args:
            model: fingerprint, or its :func:`model_key`. grid: the model's grid (``LanguageModel.grid``).
        """
        name = model if isinstance(model, str) else model_key(model)
        return self._lookup.longest(ids, tenant=tenant, model=name, grid=grid)

    # Moving

    def export(
        self, ref: str, to: str | Path | BinaryIO, *, tenant: str = DEFAULT, key: bytes | None = None
    ) -> int:
        """Write a state to a file (or an open one) that any Linstate reads; returns its bytes.

        Args:
            key: sign it, bound to the tenant: only :meth:`import_` with the same key and tenant takes it.
        """
        blob = self.load(ref, tenant=tenant).pack(key=bound_key(key, tenant))
        if isinstance(to, str | Path):
            write_atomically(to, blob)
        else:
            to.write(blob)
        return len(blob)

    def import_(
        self,
        source: str | Path | BinaryIO,
        *,
        tenant: str = DEFAULT,
        key: bytes | None = None,
        model: Fingerprint | None = None,
        table: StateTable | None = None,
        name: str | None = None,
        tags: Mapping[str, str] | None = None,
        ttl: float | None = None,
    ) -> Handle:
        """Put the state of a file (or an open one) into the store; everything in it is checked first.

        Args:
            key: take only a file that was signed with this key for this tenant. model: take only a state of this model.
            table: what its tensors may be (``decoder.state_table``), checked before anything is decoded.

        Raises StateFileError, StateMismatchError, and as :meth:`put`.
        """
        if isinstance(source, str | Path):
            try:
                blob, label = Path(source).read_bytes(), str(source)
            except OSError as error:
                raise StateFileError(f"cannot read the state {source}: {error.strerror or error}") from error
        else:
            blob, label = source.read(), "the imported state"
        state = State.unpack(blob, label, model=model, key=bound_key(key, tenant), table=table)
        return self.put(state, tenant=tenant, name=name, tags=tags, ttl=ttl)

    # Keeping

    def gc(self) -> Collected:
        """Delete expired states, then objects that no state needs. Others may read and write meanwhile."""
        return collect(self.catalogue, self.objects, self.tiers)

    def verify(self) -> Verified:
        """Read everything that any state needs and say what is wrong; changes nothing."""
        return verify(self.catalogue, self.objects)

    def usage(self, tenant: str = DEFAULT) -> dict[str, int | None]:
        """A tenant's handles and bytes, and its quota."""
        row = self.catalogue.db.execute("SELECT * FROM tenants WHERE tenant = ?", (tenant,)).fetchone()
        states, size, max_states, max_bytes = (0, 0, None, None) if row is None else tuple(row)[1:]
        return {
            "states": states,
            "bytes": size,
            "max_states": self._quota[0] if max_states is None else max_states,
            "max_bytes": self._quota[1] if max_bytes is None else max_bytes,
        }

    def stats(self) -> dict[str, Any]:
        """Numbers of the whole store: handles and objects, the tiers, and what this process did, JSON-able."""
        one = self.catalogue.db.execute
        kinds = {row["kind"]: row["n"] for row in one("SELECT kind, COUNT(*) AS n FROM states GROUP BY kind")}
        objects, size = one(
            "SELECT COUNT(*), COALESCE(SUM(bytes), 0) FROM (SELECT bytes FROM refs GROUP BY object)"
        ).fetchone()
        (tenants,) = one("SELECT COUNT(*) FROM tenants WHERE states > 0").fetchone()
        with self._lock:
            counts = dict(self._counts)
        return {
            "states": kinds.get("state", 0),
            "checkpoints": kinds.get("checkpoint", 0),
            "tenants": tenants,
            "prefix": self._lookup.stats(),
            "tiers": {**self.tiers.stats(), "storage": {"objects": objects, "bytes": size}},
            **counts,
        }

    # Inside

    def _count(self, **counts: int) -> None:
        with self._lock:
            for name, count in counts.items():
                self._counts[name] += count

    def _written(self, id: str) -> Handle:
        """The handle that was just written, even if it has expired since."""
        found = self.catalogue.db.execute(f"SELECT {COLUMNS} WHERE states.id = ?", (id,)).fetchone()
        if found is None:
            raise StateNotFoundError(f"the state {id!r} was deleted while it was written")
        return handle_of(found)

    def _row(self, ref: str, tenant: str) -> sqlite3.Row:
        living, now = alive()
        find = f"SELECT {COLUMNS} WHERE states.tenant = ? AND {living} AND "
        row: sqlite3.Row | None = self.catalogue.db.execute(
            find + "(states.id = ? OR states.name = ?)", (tenant, now, ref, ref)
        ).fetchone()
        if row is None and len(ref) >= 8 and all(c in "0123456789abcdef" for c in ref):
            rows = self.catalogue.db.execute(
                find + "states.id >= ? AND states.id < ? LIMIT 2", (tenant, now, ref, ref + "g")
            ).fetchall()
            row = rows[0] if len(rows) == 1 else None
        if row is None:
            raise StateNotFoundError(
                f"there is no state {ref!r} in the store (or it has expired); 'linstate store ls' shows what there is"
            )
        return row

    def _forget(self, name: str) -> None:
        self.tiers.drop(name)

    def _read(self, name: str) -> bytes:
        blob = self.objects.read(name)
        self._count(objects_read=1, bytes_read=len(blob))
        return blob

    def _tensors(self, name: str, device: str) -> LayerState:
        found = self.tiers.get(name, device)
        if found is not None:
            return found
        if device != "cpu":
            found = {part: tensor.to(device) for part, tensor in self._tensors(name, "cpu").items()}
        else:
            found = records.unpack_tensors(self._read(name))
        self.tiers.add(name, device, found)
        return found


def _own(tensor: Tensor) -> Tensor:
    """A tensor that holds no more memory than its own: a row of a batch would hold the batch."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _device_of(tensors: LayerState) -> str:
    return str(next(iter(tensors.values())).device) if tensors else "cpu"
