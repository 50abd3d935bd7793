"""Tensors as the native kernels read them: what they take, and where it lies."""

from __future__ import annotations

import torch
from torch import Tensor

from linstate.ops import native
from linstate.ops.dispatch import Call

DTYPES = (torch.float32, torch.bfloat16)

Place = tuple[int, int, int, int, bool]
"""Address, strides of batch, time and head, and whether it is bfloat16."""


def unfit(call: Call) -> str | None:
    """Why native kernels do not read the tensors of this call, or None."""
    if native.reason:
        return native.reason
    for name, tensor in call.items():
        if not isinstance(tensor, Tensor):
            continue
        if not tensor.is_cpu:
            return f"{name} is on {tensor.device}"
        if tensor.dtype not in DTYPES:
            return f"{name} is {tensor.dtype}, not float32 or bfloat16"
    return None


def place(t: Tensor | None) -> Place | None:
    """Where the kernels find a sequence ``[B, T, H, D]``, ``[B, T, H]`` or ``[B, T, D]`` (strides behind the first two: of the third)."""
    if t is None:
        return None
    strides = t.stride()
    return t.data_ptr(), strides[0], strides[1], strides[2], t.dtype is torch.bfloat16


def dense(t: Tensor | None) -> Tensor | None:
    """With its last axis dense; the others may have any stride."""
    return t if t is None or t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def wide(t: Tensor | None) -> Tensor | None:
    """As float32 without gaps."""
    return t if t is None else t.float().contiguous()


def address(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()
