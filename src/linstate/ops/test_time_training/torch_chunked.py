"""Test-time training by mini-batches (the dual form): no matrix per token is formed.

All gradients of a mini-batch are taken at its first weights W, so that token j sends back errors e_j at inputs x_j, and
token i reads with ``W_i = W - share_i (G + sum_{j <= i} lr_j x_j e_j^T)``, G from the tokens of the mini-batch that an
earlier call read. A layer's answer to a is then three matmuls, ``a W - share_i (a G + tril(a x^T) (lr e))``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from linstate.ops.dispatch import register
from linstate.ops.slots import Slots
from linstate.ops.test_time_training.definition import as_state
from linstate.ops.test_time_training.inner import errors, gelu, normed, with_one
from linstate.types import LayerState, state_dtype


@register("test_time_training", "chunked", "torch")
def chunked(
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
    """See the module; arguments as in :func:`linstate.ops.test_time_training`. An empty slot has a rate of zero."""
    dtype = state_dtype(q, k, v)
    if v.shape[1] == 0:
        return v.new_zeros(v.shape), initial_state
    first = [w.to(dtype) for w in layers]  # [H, K_l + 1, F_l]
    weight, bias = norm_weight.to(dtype)[:, None], norm_bias.to(dtype)[:, None]  # [H, 1, V]
    part = share.to(dtype)[:, None]  # [C, 1]
    deltas = [initial_state[f"W{i}"] for i in range(1, len(first) + 1)]  # [B, H, K_l + 1, F_l]
    sums = [initial_state[f"G{i}"] for i in range(1, len(first) + 1)]
    slots = Slots(v, initial_state["count"], len(share))
    filled = (slots.fill(x.to(dtype)).transpose(2, 3).unbind(1) for x in (q, k, v, lr[..., None]))
    outputs = []
    for n, (qc, kc, vc, rate) in enumerate(zip(*filled, strict=True)):  # [B, H, C, K]
        start = [w + delta for w, delta in zip(first, deltas, strict=True)]
        inputs, back = errors(kc, vc, start, weight, bias, eps)
        back = [rate * e for e in back]
        z, a = qc, qc
        for w, g, x, e in zip(start, sums, inputs, back, strict=True):
            a = with_one(a)
            z = a @ w - part * (a @ g + (a @ x.transpose(-1, -2)).tril() @ e)
            a = gelu(z)
        outputs.append(qc + normed(z, weight, bias, eps))
        sums = [g + x.transpose(-1, -2) @ e for g, x, e in zip(sums, inputs, back, strict=True)]
        full = slots.complete[:, n, None, None, None]
        deltas = [torch.where(full, w - part[-1] * g, w) for w, g in zip(deltas, sums, strict=True)]
        sums = [torch.where(full, torch.zeros_like(g), g) for g in sums]
    o = slots.take(torch.stack(outputs, dim=1).transpose(2, 3))  # [B, T, H, V]
    return o.to(v.dtype), as_state(deltas, sums, slots.after)
