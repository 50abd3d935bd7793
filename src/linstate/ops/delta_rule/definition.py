"""The definition of the delta rule: a plain loop over tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from linstate.ops.dispatch import begin_state, expand_heads, register
from linstate.ops.gates import decay_step
from linstate.types import state_dtype


@register("delta_rule", "step", "torch")
@register("delta_rule", "recurrent", "torch")
def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``S = diag(exp g) S``, ``S += beta k (v - S^T k)^T``, ``o = S^T q``."""
    dtype = state_dtype(q, k, v)
    heads = v.shape[2]
    q, k = expand_heads(heads, q.to(dtype) * scale, k.to(dtype))  # [B, T, H, K]
    if g is not None:
        (g,) = expand_heads(heads, g)
    state = begin_state(initial_state, k, v)
    outputs = []
    for t in range(v.shape[1]):
        state = decay_step(state, None if g is None else g[:, t])
        found = (k[:, t, :, None, :] @ state).squeeze(-2)  # [B, H, V]: what the state answers to k
        change = beta[:, t, :, None].to(dtype) * (v[:, t].to(dtype) - found)
        state = state + k[:, t, :, :, None] * change[:, :, None, :]
        outputs.append((q[:, t, :, None, :] @ state).squeeze(-2))  # [B, H, V]
    o = torch.stack(outputs, dim=1) if outputs else v.new_zeros(v.shape)
    return o.to(v.dtype), state
