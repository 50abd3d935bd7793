"""Reduced precision for stored states: bf16 halves them, int8 quarters them; the error is measured and kept with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from linstate.errors import StateError, StateFileError
from linstate.types import LayerState

Precision = Literal["exact", "bf16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("exact", "bf16", "int8")


def _wide(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float32, torch.float64)


def encode(tensors: Mapping[str, Tensor], precision: Precision) -> tuple[LayerState, float]:
    """Tensors as they are stored, and the relative error (Frobenius norm over all of them) that this costs.

    int8: each row of the last axis is scaled by its largest magnitude; the factors are stored as ``scale/<name>``.
    Integers and what is narrow already stay as they are. Raises StateError for an unknown precision.
    """
    if precision not in PRECISIONS:
        raise StateError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    stored: LayerState = {}
    for name, tensor in tensors.items():
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
    """The inverse of :func:`encode`, in the dtypes given. Raises StateFileError when names do not fit."""
    tensors: LayerState = {}
    for name, dtype in dtypes.items():
        tensor = stored.get(f"state/{name}")
        if tensor is None:
            raise StateFileError(f"the state holds no tensor {name!r}")
        if tensor.dtype == torch.int8:
            if f"scale/{name}" not in stored:
                raise StateFileError(f"the state holds no factors for the int8 tensor {name!r}")
            tensor = tensor.to(dtype) * stored[f"scale/{name}"].to(dtype)
        tensors[name] = tensor.to(dtype)
    return tensors
