"""What a state file says of its state beside the tensors: every number and text in its range, before any is used."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from linstate.errors import StateFileError, boundary
from linstate.models.fingerprint import Fingerprint
from linstate.state.precision import PRECISIONS
from linstate.types import MOST_TOKENS

MOST_ROWS = 256
"""Rows in which the tokens of a state can have run."""
MOST_GRID = 1 << 20
DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64)
}


class _Said:
    """The metadata of a file, asked for by name. Raises StateFileError for what is missing or out of range."""

    def __init__(self, meta: Mapping[str, str], name: str) -> None:
        self.meta, self.name = meta, name

    def wrong(self, key: str, expected: str) -> StateFileError:
        shown = f"is {self.meta[key][:60]!r}" if key in self.meta else "is missing"
        return StateFileError(
            f"{self.name}: its description is incomplete or wrong: its {key} {shown}, expected {expected}; it is damaged"
        )

    def text(self, key: str, *, pattern: str = "", among: tuple[str, ...] = ()) -> str:
        found = self.meta.get(key)
        if found is None or (pattern and not re.fullmatch(pattern, found)) or (among and found not in among):
            raise self.wrong(key, f"one of {', '.join(map(repr, among))}" if among else "its text")
        return found

    def whole(self, key: str, low: int, high: int, default: str | None = None) -> int:
        found = self.meta.get(key, default) or ""
        if not re.fullmatch("[0-9]{1,18}", found) or not low <= int(found) <= high:
            raise self.wrong(key, f"a whole number from {low} to {high}")
        return int(found)

    def real(self, key: str) -> float:
        found = float(self.text(key, pattern="[0-9.e+-]{1,32}"))
        if not math.isfinite(found) or found < 0:
            raise self.wrong(key, "a number of at least 0")
        return found

    def sequence(self, key: str, kind: type) -> tuple[Any, ...]:
        found = json.loads(self.text(key))
        if not isinstance(found, list) or any(type(item) is not kind for item in found):
            raise self.wrong(key, f"a list of {kind.__name__}")
        return tuple(found)

    def mapping(self, key: str) -> dict[str, str]:
        found = json.loads(self.text(key))
        if not isinstance(found, dict) or any(not isinstance(item, str) for item in found.values()):
            raise self.wrong(key, "texts by name")
        return found


def _ids(tensors: Mapping[str, Tensor], key: str, name: str) -> tuple[int, ...]:
    found = tensors.get(key)
    if found is None or found.dtype is not torch.int32 or found.dim() != 1 or (found < 0).any():
        raise StateFileError(
            f"{name}: its description is incomplete or wrong: its {key} is no list of token ids; it is damaged"
        )
    return tuple(found.tolist())


def owner(meta: Mapping[str, str], name: str) -> Fingerprint:
    """The model that a state belongs to. Raises StateFileError."""
    with boundary(StateFileError, name):
        return Fingerprint(**_Said(meta, name).mapping("model"))


def dtypes(meta: Mapping[str, str], name: str) -> dict[str, torch.dtype]:
    """The dtypes of the tensors as they were, by name. Raises StateFileError."""
    said = _Said(meta, name)
    with boundary(StateFileError, name):
        found = said.mapping("dtypes")
        if unknown := set(found.values()) - DTYPES.keys():
            raise said.wrong("dtypes", f"dtypes among {', '.join(DTYPES)}, found {sorted(unknown)[0]!r}")
        return {tensor: DTYPES[dtype] for tensor, dtype in found.items()}


def fields(meta: Mapping[str, str], tensors: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """The fields of a :class:`linstate.State` but its tensors and its model. Raises StateFileError."""
    said = _Said(meta, name)
    with boundary(StateFileError, name):
        found: dict[str, Any] = {
            "model_name": said.text("model_name"),
            "layers": said.sequence("layers", str),
            "grid": said.whole("grid", 1, MOST_GRID),
            "origin": said.whole("origin", 0, MOST_TOKENS),
            "position": said.whole("position", 0, MOST_TOKENS),
            "tail": _ids(tensors, "tail", name),
            "calls": said.sequence("calls", int),
            "rows": said.whole("rows", 1, MOST_ROWS, default="1"),  # files from before batches have none
            "chain": said.text("chain", pattern="[0-9a-f]{64}"),
            "tokens": _ids(tensors, "tokens", name) if "tokens" in tensors else None,
            "created": said.text("created"),
            "lineage": said.sequence("lineage", str),
            "composition": said.text("composition", among=("", "exact", "approximate")) or None,
            "precision": said.text("precision", among=PRECISIONS),
            "precision_error": said.real("precision_error"),
            "notes": said.mapping("notes"),
        }
    read, tail = found["position"] - found["origin"] - len(found["tail"]), len(found["tail"])
    if any(n < 1 for n in found["calls"]) or sum(found["calls"]) > tail:
        raise StateFileError(f"{name}: its calls do not fit its tail; it is damaged")
    if read < 0 or read % found["grid"] or tail > found["grid"]:
        raise StateFileError(f"{name}: position, grid and tail do not fit each other; it is damaged")
    return found
