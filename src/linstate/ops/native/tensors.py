"""Tensors as the native kernels read them: what they take, and what is made to fit."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from linstate.ops import native
from linstate.ops.dispatch import Call, snapshot_count

DTYPES = (torch.float32, torch.bfloat16)


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


def kept_shape(v: Tensor, bounds: list[int] | None, every: int, *, final: bool) -> tuple[int, int]:
    """Sequences of a call, and states that it keeps of each: those of whole ``every`` tokens, or with the final one."""
    edges = bounds or [0, v.shape[1]]
    rows = v.shape[0] if bounds is None else len(bounds) - 1
    if final:
        return rows, snapshot_count(edges, every)
    longest = max(end - start for start, end in zip(edges, edges[1:], strict=False))
    return rows, longest // every if every else 0


def complete(kept: Tensor, after: Tensor, tokens: int, bounds: list[int] | None, every: int) -> Tensor:
    """Snapshots ``[rows, N, H, K, V]``: kept ``[rows, H, N, K, V]``, and after the last whole ``every`` tokens the final state."""
    edges = bounds or [0, tokens]
    for row, (start, end) in enumerate(zip(edges, edges[1:], strict=False)):
        entry = slice(row, row + 1) if bounds else slice(None)
        kept[entry, :, (end - start) // every :] = after[entry, :, None]
    return kept.transpose(1, 2)


def edges(bounds: list[int] | None) -> Tensor | None:
    """Boundaries of packed sequences, as kernels read them."""
    return None if bounds is None else torch.tensor(bounds)


@overload
def rows(t: Tensor) -> Tensor: ...
@overload
def rows(t: Tensor | None) -> Tensor | None: ...
def rows(t: Tensor | None) -> Tensor | None:
    """A tensor ``[B, T, D]`` or a weight: float32 or bfloat16, without gaps but between rows, which are at one distance from each other."""
    if t is None:
        return None
    if t.dtype is not torch.float32 and t.dtype is not torch.bfloat16:
        t = t.float()
    if t.is_contiguous():
        return t
    if t.dim() == 3 and t.stride(2) == 1:
        batch, tokens, _ = t.shape
        if batch == 1 or tokens == 1 or t.stride(0) == tokens * t.stride(1):
            return t
    return t.contiguous()
