"""The definition of test-time training: a plain loop over tokens, one gradient at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from linstate.ops.dispatch import register
from linstate.ops.test_time_training.inner import errors, gelu, normed, with_one
from linstate.types import LayerState, state_dtype


@register("test_time_training", "step", "torch")
@register("test_time_training", "recurrent", "torch")
def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    layers: Sequence[Tensor],
    norm_weight: Tensor,
    norm_bias: Tensor,
    share: Tensor,
    eps: float,
    initial_state: LayerState,
) -> tuple[Tensor, LayerState]:
    """``G += lr_t grad_t``, ``W_t = W - share G``, ``o_t = f(q_t; W_t)``; when the mini-batch is full, ``W = W_t``, ``G = 0``."""
    dtype = state_dtype(q, k, v)
    first = [w.to(dtype) for w in layers]  # [H, K_l + 1, F_l]
    weight, bias = norm_weight.to(dtype)[:, None], norm_bias.to(dtype)[:, None]  # [H, 1, V]
    shares = share.to(dtype)  # [C]
    deltas = [initial_state[f"W{i}"] for i in range(1, len(first) + 1)]  # [B, H, K_l + 1, F_l]
    sums = [initial_state[f"G{i}"] for i in range(1, len(first) + 1)]
    count = initial_state["count"]
    outputs = []
    for t in range(v.shape[1]):
        q_t, k_t, v_t = (x[:, t, :, None].to(dtype) for x in (q, k, v))  # [B, H, 1, K]
        start = [w + delta for w, delta in zip(first, deltas, strict=True)]
        inputs, back = errors(k_t, v_t, start, weight, bias, eps)
        rate = lr[:, t, :, None, None].to(dtype)
        sums = [g + rate * x.transpose(-1, -2) * e for g, x, e in zip(sums, inputs, back, strict=True)]
        part = shares[count][:, None, None, None]
        moved = [delta - part * g for delta, g in zip(deltas, sums, strict=True)]
        z = with_one(q_t) @ (first[0] + moved[0])
        for w, delta in zip(first[1:], moved[1:], strict=True):
            z = with_one(gelu(z)) @ (w + delta)
        outputs.append((q_t + normed(z, weight, bias, eps))[:, :, 0])  # [B, H, V]
        full = (count + 1 == len(share))[:, None, None, None]
        deltas = [torch.where(full, new, old) for new, old in zip(moved, deltas, strict=True)]
        sums = [torch.where(full, torch.zeros_like(g), g) for g in sums]
        count = (count + 1) % len(share)
    o = torch.stack(outputs, dim=1) if outputs else v.new_zeros(v.shape)
    return o.to(v.dtype), as_state(deltas, sums, count)


def as_state(deltas: Sequence[Tensor], sums: Sequence[Tensor], count: Tensor) -> LayerState:
    """``{W1, W2, .., G1, G2, .., count}``."""
    named = {f"W{i}": w for i, w in enumerate(deltas, 1)} | {f"G{i}": g for i, g in enumerate(sums, 1)}
    return {**named, "count": count}
