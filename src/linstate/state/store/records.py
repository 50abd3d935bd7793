"""What the store keeps of a state: its tensors as one object, its token ids as another, the rest as a record.

Tensors stand on the grid, so the states of a conversation between two grid blocks, its forks, and the same text read
twice have the same tensors: one object, however many handles. The tail, the lineage and the notes are the record's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import safetensors.torch
import torch

from linstate.errors import ArgumentError, StateFileError, boundary
from linstate.models.fingerprint import Fingerprint
from linstate.state.description import DTYPES
from linstate.state.packing import packed
from linstate.state.precision import Precision, decode, encode, in_use
from linstate.state.state import State
from linstate.types import LayerState


@dataclass(frozen=True)
class Handle:
    """A pointer to a stored state; the state behind it never changes.

    Attributes:
        id: random, 128 bits. tenant: who it belongs to. name: what people call it, unique for a tenant, or None.
        kind: "state", or "checkpoint" for one that was kept on the way through a long text.
        model: :func:`model_key` of the model that it belongs to. model_name: what a person calls that model.
        position: tokens read. nbytes: bytes of its tensors in memory. stored_bytes: bytes of its object.
        created, expires: seconds since 1970; expires None: never.
        tags: free text by name. parent: id of the handle that it came from, or None.
        digest: the object with its tensors. content: the object with its token ids, if they are kept: states that have
            read the same have the same.
    """

    id: str
    tenant: str
    name: str | None
    kind: str
    model: str
    model_name: str
    position: int
    nbytes: int
    stored_bytes: int
    created: float
    expires: float | None
    tags: Mapping[str, str] = field(default_factory=dict)
    parent: str | None = None
    digest: str = ""
    content: str | None = None

    @property
    def ids_kept(self) -> bool:
        """Whether the token ids are kept, so that it can be searched."""
        return self.content is not None

    def info(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "ids_kept": self.ids_kept}


@dataclass(frozen=True)
class Match:
    """The stored state that has read the longest beginning of a text.

    Attributes:
        handle: it, or None. length: how many tokens of the text it has read. reason: why not more, for people.
    """

    handle: Handle | None
    length: int
    reason: str


def model_key(model: Fingerprint) -> str:
    """A short name of a model's fingerprint, 32 hex digits: equal models, equal keys."""
    return hashlib.sha256(json.dumps(asdict(model), sort_keys=True).encode()).hexdigest()[:32]


def pack_tensors(tensors: LayerState, precision: Precision) -> tuple[bytes, float]:
    """The tensors' object and the relative error of a reduced precision. The same tensors give the same bytes.

    Raises ArgumentError when a number is not finite: nothing could go on from it.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(in_use(tensor)).all()):
            raise ArgumentError(f"the state's tensor {name!r} holds NaN or Inf; it is not worth keeping")
    stored, error = encode(tensors, precision)
    dtypes = {name: str(tensors[name].dtype).removeprefix("torch.") for name in sorted(tensors)}
    plain = {name: stored[name].detach().cpu().contiguous() for name in sorted(stored)}
    # One entry of metadata only: safetensors writes several in no particular order.
    return packed(plain, {"dtypes": json.dumps(dtypes)}), error


def unpack_tensors(blob: bytes) -> LayerState:
    """The inverse of :func:`pack_tensors`, for bytes whose digest was checked. Raises StateFileError."""
    with boundary(StateFileError, "a stored object"):
        stored = safetensors.torch.load(blob)
        size = int.from_bytes(blob[:8], "little")
        dtypes = json.loads(json.loads(blob[8 : 8 + size])["__metadata__"]["dtypes"])
        return decode(stored, {name: DTYPES[dtype] for name, dtype in dtypes.items()})


def pack_ids(ids: Sequence[int]) -> bytes:
    """The object of token ids: little-endian 32-bit integers."""
    return np.asarray(ids, dtype="<i4").tobytes()


def unpack_ids(blob: bytes) -> tuple[int, ...]:
    """The inverse of :func:`pack_ids`."""
    return tuple(np.frombuffer(blob, dtype="<i4").tolist())


def record_of(state: State, precision: Precision, error: float) -> str:
    """What neither the object nor the handle says of a state, as JSON."""
    return json.dumps(
        {
            "grid": state.grid,
            "origin": state.origin,
            "tail": state.tail,
            "calls": state.calls,
            "rows": state.rows,
            "chain": state.chain,
            "created": state.created,
            "lineage": state.lineage,
            "composition": state.composition,
            "precision": precision if precision != "exact" else state.precision,
            "precision_error": max(error, state.precision_error),
            "notes": dict(state.notes),
        },
        ensure_ascii=False,
        separators=(",", ":"),
    )


def state_of(
    record: str,
    *,
    tensors: LayerState,
    model: Fingerprint,
    model_name: str,
    layers: Sequence[str],
    position: int,
    tokens: tuple[int, ...] | None,
) -> State:
    """The state that was stored. Raises StateFileError."""
    with boundary(StateFileError, "a stored record"):
        raw = json.loads(record)
        return State(
            tensors=tensors,
            model=model,
            model_name=model_name,
            layers=tuple(layers),
            position=position,
            tokens=tokens,
            tail=tuple(raw.pop("tail")),
            calls=tuple(raw.pop("calls")),
            lineage=tuple(raw.pop("lineage")),
            **raw,
        )
