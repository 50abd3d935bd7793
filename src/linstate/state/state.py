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

from linstate.errors import StateFileError, StateMismatchError
from linstate.files import write_atomically
from linstate.models.fingerprint import Fingerprint, tensor_bytes
from linstate.state import artifact
from linstate.state.precision import Precision, decode, encode, in_use
from linstate.types import LayerState, state_bytes

_MOST_ROWS = 256
DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64)
}


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
        from linstate.state.compose import compose

        return compose(self, later)

    def save(
        self,
        path: str | Path,
        *,
        precision: Precision = "exact",
        keep_tokens: bool = True,
        key: bytes | None = None,
    ) -> int:
        """Write the state to a file, atomically; returns the file's size in bytes. Arguments as :meth:`pack`."""
        blob = self.pack(precision=precision, keep_tokens=keep_tokens, key=key)
        write_atomically(path, blob)
        return len(blob)

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
        return artifact.pack(metadata, stored, key=key)

    @classmethod
    def load(cls, path: str | Path, *, model: Fingerprint | None = None, key: bytes | None = None) -> State:
        """Read a state from a file.

        Args:
            model: the fingerprint that it must have. key: the key that it must be signed with.

        Raises:
            StateFileError: it is cut short, altered, of another format version, or no state.
            StateMismatchError: it belongs to another model; says in which part that one differs.
        """
        return cls.from_artifact(artifact.read(path, key=key), str(path), model=model)

    @classmethod
    def unpack(
        cls, blob: bytes, name: str, *, model: Fingerprint | None = None, key: bytes | None = None
    ) -> State:
        """The state in the bytes of a state file, which errors call ``name``. Raises as :meth:`load`."""
        return cls.from_artifact(artifact.unpack(blob, name, key=key), name, model=model)

    @classmethod
    def from_artifact(cls, found: artifact.Artifact, name: str, *, model: Fingerprint | None = None) -> State:
        """The state in a checked artifact. Raises as :meth:`load`."""
        meta = found.metadata
        try:
            owner = Fingerprint(**json.loads(meta["model"]))
            if model is not None and (differ := owner.differences(model)):
                raise StateMismatchError(
                    f"{name}: this state was made by the model {meta['model_name']!r}, whose {' and '.join(differ)} differ "
                    "from the model in use; load that model, or read the text again with this one"
                )
            dtypes = {tensor: DTYPES[dtype] for tensor, dtype in json.loads(meta["dtypes"]).items()}
            state = cls(
                tensors=decode(found.tensors, dtypes),
                model=owner,
                model_name=meta["model_name"],
                layers=tuple(json.loads(meta["layers"])),
                grid=int(meta["grid"]),
                origin=int(meta["origin"]),
                position=int(meta["position"]),
                tail=tuple(found.tensors["tail"].tolist()),
                calls=tuple(json.loads(meta["calls"])),
                rows=int(meta.get("rows", "1")),  # files from before batches have none
                chain=meta["chain"],
                tokens=tuple(found.tensors["tokens"].tolist()) if "tokens" in found.tensors else None,
                created=meta["created"],
                lineage=tuple(json.loads(meta["lineage"])),
                composition=meta["composition"] or None,
                precision=meta["precision"],
                precision_error=float(meta["precision_error"]),
                notes=json.loads(meta["notes"]),
            )
        except (KeyError, ValueError, TypeError) as error:
            raise StateFileError(
                f"{name}: its description is incomplete or wrong ({type(error).__name__}: {error})"
            ) from error
        rows = {tensor.shape[0] if tensor.dim() else -1 for tensor in state.tensors.values()}
        read = state.position - state.origin - len(state.tail)
        replayable = all(type(n) is int and n > 0 for n in state.calls) and sum(state.calls) <= len(
            state.tail
        )
        if not replayable or not 1 <= state.rows <= _MOST_ROWS:
            raise StateFileError(f"{name}: its calls do not fit its tail; it is damaged")
        if state.grid < 1 or read < 0 or read % state.grid or len(state.tail) > state.grid or rows - {1}:
            raise StateFileError(
                f"{name}: position, grid, tail or tensors do not fit each other; it is damaged"
            )
        return state

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
