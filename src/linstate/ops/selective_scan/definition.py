"""The definition of the elementwise scan: a plain loop over tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from linstate.ops.dispatch import begin_state, expand_heads, register
from linstate.types import state_dtype


def ones_unless(x: Tensor | None, v: Tensor) -> Tensor:
    """q or k ``[B, T, Hk, K]``: what was given, or ones with K = 1."""
    return v.new_ones((1, 1, 1, 1)).expand(v.shape[0], v.shape[1], 1, 1) if x is None else x


@register("selective_scan", "step", "torch")
@register("selective_scan", "recurrent", "torch")
def recurrent(
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor,
    g: Tensor,
    A: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``S = exp(g A) * S + k v^T``, ``o = S^T q``; without q and k they are ones and K = 1."""
    q, k = ones_unless(q, v), ones_unless(k, v)
    dtype = state_dtype(q, k, v)
    heads = v.shape[2]
    q, k = expand_heads(heads, q.to(dtype) * scale, k.to(dtype))  # [B, T, H, K]
    if A is not None:
        A = A.to(dtype)
    state = begin_state(initial_state, k, v)
    outputs = []
    for t in range(v.shape[1]):
        log = g[:, t, :, None, :].to(dtype)  # [B, H, 1, V]
        if A is not None:
            log = log * A  # [B, H, K, V]
        state = log.exp() * state + k[:, t, :, :, None] * v[:, t, :, None, :].to(dtype)
        outputs.append((q[:, t, :, None, :] @ state).squeeze(-2))  # [B, H, V]
    o = torch.stack(outputs, dim=1) if outputs else v.new_zeros(v.shape)
    return o.to(v.dtype), state
