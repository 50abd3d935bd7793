"""Norms over the last axis with their gate, in one native call: torch's rms norm on a CPU is nine calls of its own.

The kernel is ``csrc/norm.cpp``. Between reading and writing everything is float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linstate.ops import native
from linstate.ops.native.program import note
from linstate.ops.native.tensors import DTYPES

GATES = ("none", "silu", "sigmoid")
ACTIVATIONS = ("sigmoid", "tanh", "relu_squared")


def serves(*tensors: Tensor | None) -> bool:
    """Whether :func:`norm` takes these: float32 or bf16 on the CPU, plain tensors, nothing that wants a gradient."""
    if torch.compiler.is_compiling():
        return False
    grad = torch.is_grad_enabled()
    for t in tensors:
        if t is not None and (not t.is_cpu or t.dtype not in DTYPES or (grad and t.requires_grad)):
            return False
    return True


def norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None = None,
    *,
    eps: float,
    centre: bool = False,
    weight_plus: float = 0.0,
    gate: str = "none",
    z: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``x [..., D] -> [..., D]`` without gradients, normed in ``groups`` equal parts of the last axis.

    Args:
        weight, bias: ``[D]``, or ``[D / groups]`` for every group the same. weight_plus: added to each weight.
        centre: with mean and variance (layer norm, group norm), else by the root of the mean square.
        gate: activation of ``z [..., D]``, which multiplies the result.
        dtype: bf16 for an x in float32 that is rounded to that first, as a residual stream is; default: that of x.
    """
    import linstate._native as _native

    size = x.shape[-1] // groups
    flat = x.reshape(-1, x.shape[-1])  # [rows, D]
    if flat.stride(-1) != 1:
        flat = flat.contiguous()
    y = torch.empty(x.shape, dtype=dtype or x.dtype)
    narrow = torch.bfloat16
    at_z = None
    if z is not None:
        z = z.reshape(flat.shape)
        z = z if z.stride(-1) == 1 else z.contiguous()
        at_z = (z.data_ptr(), z.stride(0), size, z.dtype is narrow)
    at_weight, at_bias = (
        None if t is None else (t.data_ptr(), 0, size if t.shape[0] != size else 0, t.dtype is narrow)
        for t in (weight, bias)
    )
    call = (
        flat.shape[0],
        groups,
        size,
        centre,
        eps,
        (flat.data_ptr(), flat.stride(0), size, x.dtype is narrow),
        at_weight,
        weight_plus,
        at_bias,
        GATES.index(gate),
        at_z,
        (y.data_ptr(), y.shape[-1], size, y.dtype is narrow),
    )
    _native.norm(*call, torch.get_num_threads())
    note("norm", call, flat, weight, bias, z, y)
    return y


def adds(x: Tensor, y: Tensor) -> bool:
    """Whether :func:`add` takes these."""
    of_stream = x.dtype is torch.float32 and y.dtype is torch.bfloat16 and x.shape == y.shape
    return of_stream and native.available and x.is_contiguous() and y.is_contiguous() and serves(x, y)


def add(x: Tensor, y: Tensor) -> Tensor:
    """``x + y``, float32 and bf16: a residual stream and what a branch made. Torch makes a float32 copy of y first."""
    import linstate._native as _native

    out = torch.empty_like(x)
    _native.stream(x.numel(), x.data_ptr(), y.data_ptr(), out.data_ptr(), torch.get_num_threads())
    return out


def gated(x: Tensor) -> Tensor:
    """``silu(a) * b`` for ``x = (a, b)`` bf16 ``[..., 2 D]``, without gradients: ``[..., D]``."""
    import linstate._native as _native

    flat = x.reshape(-1, x.shape[-1])  # [rows, 2 D]
    if flat.stride(-1) != 1:
        flat = flat.contiguous()
    y = torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=x.dtype)
    call = (flat.shape[0], y.shape[-1], (flat.data_ptr(), flat.stride(0)), y.data_ptr())
    _native.gated(*call, torch.get_num_threads())
    note("gated", call, flat, y)
    return y


def activate(x: Tensor, kind: str) -> Tensor:
    """An activation of :data:`ACTIVATIONS` of bf16 numbers, without gradients."""
    import linstate._native as _native

    x = x.contiguous()
    y = torch.empty_like(x)
    call = (ACTIVATIONS.index(kind), x.numel(), x.data_ptr(), y.data_ptr())
    _native.activate(*call, torch.get_num_threads())
    note("activate", call, x, y)
    return y
