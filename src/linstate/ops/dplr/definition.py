"""The definition of the diagonal-plus-low-rank recurrence: a plain loop over tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from linstate.ops.dispatch import begin_state, expand_heads, register
from linstate.ops.gates import decay_step
from linstate.types import state_dtype


@register("dplr", "step", "torch")
@register("dplr", "recurrent", "torch")
def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``S = diag(exp g) S + a (S^T b)^T + k v^T`` with the S before the token in the middle term, ``o = S^T q``."""
    dtype = state_dtype(q, k, v)
    heads = v.shape[2]
    q, k, a, b = expand_heads(
        heads, q.to(dtype) * scale, k.to(dtype), a.to(dtype), b.to(dtype)
    )  # [B, T, H, K]
    if g is not None:
        (g,) = expand_heads(heads, g)
    state = begin_state(initial_state, k, v)
    outputs = []
    for t in range(v.shape[1]):
        found = (b[:, t, :, None, :] @ state).squeeze(-2)  # [B, H, V]
        kept = decay_step(state, None if g is None else g[:, t])
        state = (
            kept
            + a[:, t, :, :, None] * found[:, :, None, :]
            + k[:, t, :, :, None] * v[:, t, :, None, :].to(dtype)
        )
        outputs.append((q[:, t, :, None, :] @ state).squeeze(-2))  # [B, H, V]
    o = torch.stack(outputs, dim=1) if outputs else v.new_zeros(v.shape)
    return o.to(v.dtype), state
