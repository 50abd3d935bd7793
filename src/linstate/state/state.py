"""A state: what a model keeps of the text it has read. Immutable; saved, loaded, forked and composed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from linstate.errors import StateFileError, StateMismatchError, boundary
from linstate.models.fingerprint import Fingerprint, tensor_bytes
from linstate.models.state_table import StateTable
from linstate.state import artifact, description
from linstate.state.compose import compose
from linstate.state.precision import Precision, check_stored, decode, encode, in_use
from linstate.types import LayerState, state_bytes


def now() -> str:
    """The time of creation as it is written: UTC, seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def chain(previous: str, ids: Sequence[int]) -> str:
    """The hash chain over token ids: one link per grid block, so that equal prefixes have equal chains."""
    block = torch.tensor(list(ids), dtype=torch.int32)
    return hashlib.sha256(bytes.fromhex(previous) + bytes(tensor_bytes(block))).hexdigest()


@dataclass(frozen=True, eq=False)
class State:
    """What a model keeps of a text.

    ``tensors`` stand at a position of the fixed grid, a multiple of ``grid`` tokens after ``origin``; the tokens
    behind it hang over and are kept as ids (``tail``). A state is therefore a function of the token ids alone, however
    they arrived, which is what makes a restored state bit-identical to an uninterrupted one.

    Attributes:
        tensors: the model's state, ``layers.<i>.mixer.<name> -> [1, ...]``.
        model: fingerprint of the model it belongs to. model_name: what a person calls that model.
        layers: mixer of each application of a layer.
        grid, origin: the grid. position: tokens read in all, tail included.
        tail: ids of the newest tokens, at most ``grid`` of them.
        calls: sizes of the model calls in which a generation under way has run the tail so far, so that it can be
            replayed exactly; empty when nothing is under way. rows: in how many rows its calls of one token ran.
        chain: hash chain over all ids up to the grid position.
        tokens: all ids, where they are kept (a lost or foreign state can then be rebuilt), else None.
        created: ISO 8601, UTC. lineage: ids of the states that it came from, oldest first.
        composition: "exact" or "approximate" if it was composed. precision, precision_error: how it was stored.
        notes: free text by name (title, sources).
    """

    tensors: LayerState
    model: Fingerprint
    model_name: str
    layers: tuple[str, ...]
    grid: int
    origin: int = 0
    position: int = 0
    tail: tuple[int, ...] = ()
    calls: tuple[int, ...] = ()
    rows: int = 1
    chain: str = "00" * 32
    tokens: tuple[int, ...] | None = None
    created: str = field(default_factory=now)
    lineage: tuple[str, ...] = ()
    composition: str | None = None
    precision: str = "exact"
    precision_error: float = 0.0
    notes: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def id(self) -> str:
        """A name made from the content: equal content, equal id (16 hex digits)."""
        about = [asdict(self.model), self.position, self.tail, self.chain, self.calls]
        if self.rows != 1:  # left out otherwise: ids of states from before batches stay
            about.append(self.rows)
        digest = hashlib.sha256(json.dumps(about).encode())
        for name in sorted(self.tensors):
            digest.update(name.encode())
            digest.update(tensor_bytes(in_use(self.tensors[name])))
        return digest.hexdigest()[:16]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return state_bytes(self.tensors)

    def fork(self, **notes: str) -> State:
        """A new state that goes on from this one; the tensors are shared, since nothing ever changes them."""
        return replace(self, lineage=(*self.lineage, self.id), created=now(), notes={**self.notes, **notes})

    def compose(self, later: State) -> State:
        """This state followed by ``later``, without reading anything again; see :mod:`linstate.state.compose`."""
        return replace(compose(self, later), created=now())

    def save(
        self,
        path: str | Path,
        *,
        precision: Precision = "exact",
        keep_tokens: bool = True,
        key: bytes | None = None,
    ) -> int:
        """Write the state to a file, atomically; returns the file's size in bytes. Arguments as :meth:`pack`."""
        return artifact.write(path, *self._stored(precision, keep_tokens), key=key)

    def pack(
        self, *, precision: Precision = "exact", keep_tokens: bool = True, key: bytes | None = None
    ) -> bytes:
        """The bytes of a state file.

        Args:
            precision: "exact" (bit-identical when restored), "bf16" (half) or "int8" (a quarter); the error that the
                latter cost is measured and written into the file.
            keep_tokens: write the ids of all tokens too, if the state has them (4 bytes each).
            key: sign the file with this key (HMAC-SHA256).
        """
        return artifact.pack(*self._stored(precision, keep_tokens), key=key)

    def _stored(self, precision: Precision, keep_tokens: bool) -> tuple[dict[str, str], LayerState]:
        """Metadata and tensors as a file has them."""
        stored, error = encode(self.tensors, precision)
        stored["tail"] = torch.tensor(self.tail, dtype=torch.int32)
        if self.tokens is not None and keep_tokens:
            stored["tokens"] = torch.tensor(self.tokens, dtype=torch.int32)
        metadata = {
            "model": json.dumps(asdict(self.model)),
            "model_name": self.model_name,
            "layers": json.dumps(self.layers),
            "grid": str(self.grid),
            "origin": str(self.origin),
            "position": str(self.position),
            "calls": json.dumps(self.calls),
            "rows": str(self.rows),
            "chain": self.chain,
            "created": self.created,
            "lineage": json.dumps(self.lineage),
            "composition": self.composition or "",
            "precision": precision if precision != "exact" else self.precision,
            "precision_error": repr(max(error, self.precision_error)),
            "notes": json.dumps(dict(self.notes)),
            "dtypes": json.dumps(
                {name: str(t.dtype).removeprefix("torch.") for name, t in self.tensors.items()}
            ),
        }
        return metadata, stored

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        model: Fingerprint | None = None,
        key: bytes | None = None,
        table: StateTable | None = None,
    ) -> State:
        """Read a state from a file.

        Args:
            model: the fingerprint that it must have. key: the key that it must be signed with.
            table: what its tensors may be (``decoder.state_table``), checked before anything is decoded.

        Raises:
            StateFileError: it is cut short, altered, of another format version, or no state.
            StateMismatchError: it belongs to another model; says in which part that one differs.
        """
        return cls.from_artifact(artifact.read(path, key=key), str(path), model=model, table=table)

    @classmethod
    def unpack(
        cls,
        blob: bytes,
        name: str,
        *,
        model: Fingerprint | None = None,
        key: bytes | None = None,
        table: StateTable | None = None,
    ) -> State:
        """The state in the bytes of a state file, which errors call ``name``. Raises as :meth:`load`."""
        return cls.from_artifact(artifact.unpack(blob, name, key=key), name, model=model, table=table)

    @classmethod
    def from_artifact(
        cls,
        found: artifact.Artifact,
        name: str,
        *,
        model: Fingerprint | None = None,
        table: StateTable | None = None,
    ) -> State:
        """The state in a checked artifact. Raises as :meth:`load`."""
        meta = found.metadata
        owner = description.owner(meta, name)
        if model is not None and (differ := owner.differences(model)):
            raise StateMismatchError(
                f"{name}: this state was made by the model {meta.get('model_name')!r}, whose {' and '.join(differ)} differ "
                "from the model in use; load that model, or read the text again with this one"
            )
        said = description.fields(meta, found.tensors, name)
        dtypes = description.dtypes(meta, name)
        with boundary(StateFileError, name):
            if table is not None:
                check_stored(found.tensors, dtypes, table, name)
            tensors = decode(found.tensors, dtypes)
        if any(not tensor.dim() or tensor.shape[0] != 1 for tensor in tensors.values()):
            raise StateFileError(f"{name}: its tensors are not those of one row; it is damaged")
        if table is not None:
            table.check(tensors, name)
        return cls(tensors=tensors, model=owner, **said)

    def info(self) -> dict[str, Any]:
        """What there is to say about the state, JSON-able."""
        return {
            "id": self.id,
            "model": self.model_name,
            "fingerprint": asdict(self.model),
            "layers": list(self.layers),
            "position": self.position,
            "grid": self.grid,
            "tail_tokens": len(self.tail),
            "state_bytes": self.nbytes,
            "tokens_kept": self.tokens is not None,
            "created": self.created,
            "lineage": list(self.lineage),
            "composition": self.composition,
            "precision": self.precision,
            "precision_error": self.precision_error,
            "notes": dict(self.notes),
        }
