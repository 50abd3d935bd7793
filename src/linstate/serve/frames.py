"""A state on its way from one server to another: the state file in frames, so that a layer leaves as soon as it is ready.

::

    stream = "LSTF\\x01" frame*
    frame  = kind (1 byte), number (4), length (8), SHA-256 of the payload (32), payload; integers little-endian

    HEAD   JSON: model key, frames in all, name of the transfer
    LAYER  safetensors: the stored tensors of one layer (``state/layers.3.mixer.S``, with int8 also ``scale/...``)
    END    JSON: the metadata of the state file, its checksum among them

What arrived is put together to the state file that the sender would have written, and opened like any other: lengths,
numbers, checksums and names are checked before a tensor is used. No pickle.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import safetensors.torch
import torch

from linstate.errors import StateFileError, boundary
from linstate.models.fingerprint import Fingerprint
from linstate.models.state_table import StateTable
from linstate.state import artifact
from linstate.state.packing import packed
from linstate.state.precision import Precision, encode
from linstate.state.state import State
from linstate.types import LayerState

MAGIC = b"LSTF\x01"
_HEADER = 1 + 4 + 8 + 32
_SMALL = 1 << 20
"""Bytes that a frame of JSON may have."""


class Kind(IntEnum):
    """What a frame holds."""

    HEAD = 1
    LAYER = 2
    END = 3


@dataclass(frozen=True)
class Frame:
    """One frame whose length and checksum were right."""

    kind: Kind
    number: int
    payload: bytes

    def json(self) -> dict[str, Any]:
        """The payload of HEAD and END. Raises StateFileError."""
        with boundary(StateFileError, f"frame {self.number}: its JSON"):
            found = json.loads(self.payload)
            if not isinstance(found, dict):
                raise ValueError("no object")
            return found


def pack(kind: Kind, number: int, payload: bytes) -> bytes:
    """The bytes of a frame."""
    head = bytes([kind]) + number.to_bytes(4, "little") + len(payload).to_bytes(8, "little")
    return head + hashlib.sha256(payload).digest() + payload


def head(number: int, **content: Any) -> bytes:
    """A HEAD frame."""
    return pack(Kind.HEAD, number, json.dumps(content).encode())


def layer(number: int, tensors: LayerState, precision: Precision) -> bytes:
    """A LAYER frame of tensors with their full names."""
    stored, _ = encode(tensors, precision)
    plain = {name: t.detach().cpu().contiguous() for name, t in stored.items()}
    return pack(Kind.LAYER, number, packed(plain))


def end(number: int, state: State, precision: Precision) -> bytes:
    """The END frame of a state: what its file says of it, checksum included."""
    found = artifact.unpack(state.pack(precision=precision, keep_tokens=False), "the state to ship")
    return pack(Kind.END, number, json.dumps({"metadata": found.metadata, "tail": list(state.tail)}).encode())


class FrameReader:
    """Bytes as they arrive to frames.

    Args:
        largest: bytes that a LAYER frame may have; nothing longer is waited for.
        number: of the next frame; above 0 in a stream that goes on where another was cut.
    """

    def __init__(self, largest: int, number: int = 0) -> None:
        self.largest, self.number = largest, number
        self._held = bytearray()
        self._begun = False

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that are whole with ``data``. Raises StateFileError saying what is wrong."""
        self._held += data
        if not self._begun:
            if not MAGIC.startswith(bytes(self._held[: len(MAGIC)])):
                raise StateFileError("what came is no stream of a state")
            if len(self._held) < len(MAGIC):
                return
            del self._held[: len(MAGIC)]
            self._begun = True
        while len(self._held) >= _HEADER:
            kind, number = self._held[0], int.from_bytes(self._held[1:5], "little")
            length = int.from_bytes(self._held[5:13], "little")
            if kind not in tuple(Kind) or number != self.number:
                raise StateFileError(f"expected frame {self.number}, got kind {kind} with number {number}")
            bound = self.largest if kind == Kind.LAYER else _SMALL
            if length > bound:
                raise StateFileError(f"frame {number} claims {length:,} bytes, at most {bound:,} are allowed")
            if len(self._held) < _HEADER + length:
                return
            payload = bytes(self._held[_HEADER : _HEADER + length])
            if hashlib.sha256(payload).digest() != bytes(self._held[13:_HEADER]):
                raise StateFileError(f"frame {number}: its checksum does not fit; it was damaged on the way")
            del self._held[: _HEADER + length]
            self.number += 1
            yield Frame(Kind(kind), number, payload)


class Assembler:
    """Frames to the state; each is checked when it comes.

    Args:
        model: the fingerprint that it must have. table: what its tensors may be (``decoder.state_table``): a frame of anything
            else is refused when it comes. layers: of the model, each of which sends one frame.
    """

    def __init__(self, model: Fingerprint, table: StateTable, layers: int) -> None:
        self.model, self.table, self.layers, self.came = model, table, layers, 0
        self.tensors: LayerState = {}
        self.state: State | None = None

    def add(self, frame: Frame) -> None:
        """Take a frame. Raises StateFileError, StateMismatchError."""
        if self.state is not None:
            raise StateFileError(f"frame {frame.number} came behind the end")
        if frame.kind is Kind.LAYER:
            with boundary(StateFileError, f"frame {frame.number}"):
                found = safetensors.torch.load(frame.payload)
            self.came += 1
            unknown = {name.partition("/")[2] for name in found} - self.table.keys()
            if self.came > self.layers or unknown or self.tensors.keys() & found.keys():
                raise StateFileError(
                    f"frame {frame.number} brings tensors that came already or that the model's state does not have"
                )
            self.tensors |= found
        elif frame.kind is Kind.END:
            self.state = self._whole(frame)

    def _whole(self, frame: Frame) -> State:
        said = frame.json()
        with boundary(StateFileError, "the end of the stream"):
            metadata = {str(k): str(v) for k, v in said["metadata"].items()}
            tail = torch.tensor([int(id) for id in said["tail"]], dtype=torch.int32)
        checksum = metadata.pop("checksum", "")
        metadata.pop("signature", None)
        blob = artifact.pack(metadata, {**self.tensors, "tail": tail})
        found = artifact.unpack(blob, "the shipped state")
        if found.metadata["checksum"] != checksum:
            raise StateFileError("the shipped state is not what was sent: its checksum does not fit")
        return State.from_artifact(found, "the shipped state", model=self.model, table=self.table)
