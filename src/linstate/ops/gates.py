"""Log gates in their canonical shapes, shared by the recurrences that take them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from linstate.ops.checks import Shapes
from linstate.types import state_dtype


def bind_gate(shapes: Shapes, g: Tensor | None) -> Tensor | None:
    """Check log gates ``[Hv]``, ``[B, T, Hv]`` or ``[B, T, Hv, K]`` and return them with a time axis.

    Gates per channel may also come with the Hk heads of q and k.
    """
    if g is None:
        return None
    spec = shapes.bind_one_of("g", g, ("Hv", "B T Hv", "B T Hg K"))
    if spec == "Hv":
        return g.expand(shapes["B"], shapes["T"], -1)
    if spec == "B T Hg K" and shapes["Hg"] not in (shapes["Hv"], shapes["Hk"]):
        shapes.bind("g", g, "B T Hv K")
    return g


def decay_step(state: Tensor, g: Tensor | None) -> Tensor:
    """``diag(exp g) S`` for one token: state ``[B, H, K, V]``, g None, ``[B, H]`` or ``[B, H, K]``."""
    if g is None:
        return state
    return state * g.to(state.dtype).exp()[(...,) + (None,) * (state.dim() - g.dim())]


def softplus_decay(x: Tensor, dt_bias: Tensor, A_log: Tensor) -> Tensor:
    """The log decay ``-exp(A_log) softplus(x + dt_bias)`` <= 0 of Mamba's children, in float32 (float64 for float64)."""
    wide = state_dtype(x)
    return -A_log.to(wide).exp() * F.softplus(x.to(wide) + dt_bias.to(wide))
