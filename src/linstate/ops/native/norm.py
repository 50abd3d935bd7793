"""Norms over the last axis with their gate, in one native call: torch's rms norm on a CPU is nine calls of its own.

The kernel is ``csrc/kernels/norm.cpp``. Between reading and writing everything is float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linstate.ops import native
from linstate.ops.native import lib
from linstate.ops.native.program import note
from linstate.ops.native.tensors import DTYPES, rows

_GATES = {name: getattr(lib.OutputGate, name) for name in ("none", "silu", "sigmoid") if native.available}
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
        gate: activation of ``z`` like x, which multiplies the result.
        dtype: bf16 for an x in float32 that is rounded to that first, as a residual stream is; default: that of x.
    """
    y = torch.empty(x.shape, dtype=dtype or x.dtype)
    call = (
        rows(x),
        groups,
        eps,
        centre,
        None if weight is None else weight.contiguous(),
        weight_plus,
        None if bias is None else bias.contiguous(),
        _GATES[gate],
        None if z is None else rows(z),
        y,
    )
    lib.norm(*call, torch.get_num_threads())
    note("norm", call)
    return y


def adds(x: Tensor, y: Tensor) -> bool:
    """Whether :func:`add` takes these."""
    of_stream = x.dtype is torch.float32 and y.dtype is torch.bfloat16 and x.shape == y.shape
    return of_stream and native.available and x.is_contiguous() and y.is_contiguous() and serves(x, y)


def add(x: Tensor, y: Tensor) -> Tensor:
    """``x + y``, float32 and bf16: a residual stream and what a branch made. Torch makes a float32 copy of y first."""
    out = torch.empty_like(x)
    lib.stream(x, y, out, torch.get_num_threads())
    return out


def gated(x: Tensor) -> Tensor:
    """``silu(a) * b`` for ``x = (a, b)`` bf16 ``[..., 2 D]``, without gradients: ``[..., D]``."""
    y = torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=x.dtype)
    call = (rows(x), y)
    lib.gated(*call, torch.get_num_threads())
    note("gated", call)
    return y


def activate(x: Tensor, kind: str) -> Tensor:
    """An activation of :data:`ACTIVATIONS` of bf16 numbers, without gradients."""
    x = x.contiguous()
    y = torch.empty_like(x)
    call = (getattr(lib.Activation, kind), x, y)
    lib.activate(*call, torch.get_num_threads())
    note("activate", call)
    return y
