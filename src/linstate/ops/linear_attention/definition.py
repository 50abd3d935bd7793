"""The definition of linear attention: a plain loop over tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from linstate.ops.dispatch import begin_state, expand_heads, register
from linstate.ops.gates import decay_step
from linstate.types import state_dtype


@register("linear_attention", "step", "torch")
@register("linear_attention", "recurrent", "torch")
def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    bonus: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``S_t = diag(exp g_t) S_{t-1} + k_t v_t^T``, ``o_t = S_t^T q_t``; with bonus ``o_t = (S_{t-1} + diag(u) k_t v_t^T)^T q_t``."""
    dtype = state_dtype(q, k, v)
    heads = v.shape[2]
    q, k = expand_heads(heads, q.to(dtype) * scale, k.to(dtype))  # [B, T, H, K]
    if g is not None:
        (g,) = expand_heads(heads, g)
    if bonus is not None:
        bonus = bonus.to(dtype)[:, :, None]  # [H, K, 1]
    state = begin_state(initial_state, k, v)
    outputs = []
    for t in range(v.shape[1]):
        write = k[:, t, :, :, None] * v[:, t, :, None, :].to(dtype)  # [B, H, K, V]
        before = state
        state = decay_step(state, None if g is None else g[:, t]) + write
        read = state if bonus is None else before + bonus * write
        outputs.append((q[:, t, :, None, :] @ read).squeeze(-2))  # [B, H, V]
    o = torch.stack(outputs, dim=1) if outputs else v.new_zeros(v.shape)
    return o.to(v.dtype), state
