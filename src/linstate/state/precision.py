"""How the tensors of a state are stored: without the places of a window that are not in use yet, and, if asked, in reduced
precision: bf16 halves them, int8 quarters them; the error is measured and kept with them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from linstate.errors import StateError, StateFileError, StateMismatchError
from linstate.models.fingerprint import tensor_bytes
from linstate.models.state_table import StateTable
from linstate.ops.zeros import untouched_zeros
from linstate.types import LayerState

Precision = Literal["exact", "bf16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("exact", "bf16", "int8")


_LEAST, _MOST, _TENSORS = 4096, 4 * 2**20, 256
"""Of one tensor: bytes of places that are worth leaving out, and that may be. Tensors of which some are: so what a file can ask
for is bounded."""


def _wide(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float32, torch.float64)


def encode(tensors: Mapping[str, Tensor], precision: Precision) -> tuple[LayerState, float]:
    """Tensors as they are stored, and the relative error (Frobenius norm over all of them) that this costs.

    int8: each row of the last axis is scaled by its largest magnitude; the factors are stored as ``scale/<name>``.
    Integers and what is narrow already stay as they are. Places (axis 1) at the beginning that are zero to the bit, as those of a
    window that is not full yet, are left out; how many there are in all is stored as ``places/<name>``.
    Raises StateError for an unknown precision.
    """
    if precision not in PRECISIONS:
        raise StateError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    stored: LayerState = {}
    for name, tensor in tensors.items():
        if (part := in_use(tensor)) is not tensor:
            stored[f"places/{name}"] = torch.tensor([tensor.shape[1]], dtype=torch.int64)
            tensor = part.contiguous()
        if precision == "exact" or not _wide(tensor):
            stored[f"state/{name}"] = tensor
        elif precision == "bf16":
            stored[f"state/{name}"] = tensor.to(torch.bfloat16)
        else:
            scale = tensor.abs().amax(-1, keepdim=True).float() / 127
            stored[f"state/{name}"] = (
                (tensor / scale.clamp(min=1e-30)).round().clamp(-127, 127).to(torch.int8)
            )
            stored[f"scale/{name}"] = scale
    if precision == "exact":
        return stored, 0.0
    back = decode(stored, {name: tensor.dtype for name, tensor in tensors.items()})
    off = sum(
        float((back[name].double() - t.double()).square().sum()) for name, t in tensors.items() if _wide(t)
    )
    size = sum(float(t.double().square().sum()) for t in tensors.values() if _wide(t))
    return stored, (off / size) ** 0.5 if size else 0.0


def decode(stored: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> LayerState:
    """The inverse of :func:`encode`, in the dtypes given. Raises StateFileError when names or places do not fit."""
    if sum(name.startswith("places/") for name in stored) > _TENSORS:
        raise StateFileError(f"the state leaves places out of more than {_TENSORS} tensors; it is damaged")
    tensors: LayerState = {}
    for name, dtype in dtypes.items():
        tensor = stored.get(f"state/{name}")
        if tensor is None:
            raise StateFileError(f"the state holds no tensor {name!r}")
        if tensor.dtype == torch.int8:
            scale = stored.get(f"scale/{name}")
            if scale is None or scale.shape != (*tensor.shape[:-1], 1) or not scale.is_floating_point():
                raise StateFileError(f"the state holds no factors for the int8 tensor {name!r} that fit it")
            tensor = tensor.to(dtype) * scale.to(dtype)
        tensor = tensor.to(dtype)
        if (places := stored.get(f"places/{name}")) is not None:
            tensor = _filled(name, tensor, places)
        tensors[name] = tensor
    return tensors


def check_stored(
    stored: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype], table: StateTable, what: str
) -> None:
    """What a file holds against a model's state, before anything is made of it: the shape that each tensor would have.

    Raises StateFileError, StateMismatchError.
    """
    known = {f"{kind}/{name}" for kind in ("state", "scale", "places") for name in table}
    if unknown := sorted(stored.keys() - known - {"tail", "tokens"}):
        raise StateMismatchError(f"{what}: it holds other tensors than the model's state ({unknown[0]!r})")
    for name, dtype in dtypes.items():
        tensor = stored.get(f"state/{name}")
        if tensor is None:
            raise StateFileError(f"{what}: it holds no tensor {name!r}; it is damaged")
        shape = list(tensor.shape)
        if f"places/{name}" in stored and len(shape) > 1:
            shape[1] = _places(name, tensor, stored[f"places/{name}"])
        table.check_shape(name, tuple(shape), dtype, what)


def in_use(tensor: Tensor) -> Tensor:
    """A tensor of one row without the places (axis 1) at its beginning that are to be left out; itself if there are none."""
    if tensor.dim() < 3 or tensor.shape[0] != 1 or tensor.nbytes <= _LEAST:
        return tensor
    place = tensor[0, 0].nbytes  # bytes
    words = np.frombuffer(tensor_bytes(tensor), f"u{tensor.element_size()}")
    first = int((words != 0).argmax())
    first = first * tensor.element_size() // place if words[first] else tensor.shape[1]
    unused = min(first, _MOST // place)
    return tensor[:, unused:] if unused * place >= _LEAST else tensor


def _places(name: str, tensor: Tensor, places: Tensor) -> int:
    """How many places a tensor has with those that were left out of it. Raises StateFileError."""
    wanted = int(places) if places.dtype == torch.int64 and places.numel() == 1 else -1
    missing = wanted - tensor.shape[1] if tensor.dim() >= 3 else -1
    if missing < 1 or missing * math.prod(tensor.shape[2:]) * tensor.element_size() > _MOST:
        raise StateFileError(
            f"the state's tensor {name!r} has the shape {list(tensor.shape)} and cannot have {wanted:,} places; it is damaged"
        )
    return wanted


def _filled(name: str, tensor: Tensor, places: Tensor) -> Tensor:
    """A tensor with the places that were left out of it."""
    wanted = _places(name, tensor, places)
    filled = untouched_zeros((1, wanted, *tensor.shape[2:]), tensor)
    filled[:, wanted - tensor.shape[1] :] = tensor
    return filled
