"""The elementwise scan by doubling inside a chunk, the state carried from chunk to chunk.

``S_t = a_t S_{t-1} + w_t`` composes as ``(a, w) then (a', w') = (a a', a' w + w')``; log2(C) rounds give
every prefix of the chunk. Decays are products of numbers <= 1. Memory: C x K x V for one chunk at a time
when no gradient is asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linstate.ops.dispatch import begin_state, expand_heads, register
from linstate.ops.selective_scan.definition import ones_unless
from linstate.types import state_dtype

CHUNK = 32


@register("selective_scan", "chunked", "torch")
def chunked(
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor,
    g: Tensor,
    A: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See the module; arguments as in :func:`linstate.ops.selective_scan`."""
    q, k = ones_unless(q, v), ones_unless(k, v)
    dtype = state_dtype(q, k, v)
    heads = v.shape[2]
    state = begin_state(initial_state, k, v)
    if v.shape[1] == 0:
        return torch.zeros_like(v), state
    q, k = expand_heads(heads, q, k)
    outputs = []
    for qc, kc, vc, gc in zip(*(x.split(CHUNK, dim=1) for x in (q, k, v, g)), strict=True):
        log = gc.to(dtype)[:, :, :, None, :]  # [B, C, H, 1, V]
        keep = (log if A is None else log * A.to(dtype)).exp()  # [B, C, H, K or 1, V]
        add = kc.to(dtype)[..., None] * vc.to(dtype)[..., None, :]  # [B, C, H, K, V]
        reach = 1
        while reach < vc.shape[1]:
            add = torch.cat([add[:, :reach], add[:, reach:] + keep[:, reach:] * add[:, :-reach]], dim=1)
            keep = torch.cat([keep[:, :reach], keep[:, reach:] * keep[:, :-reach]], dim=1)
            reach *= 2
        states = add + keep * state[:, None]  # [B, C, H, K, V]
        outputs.append((qc.to(dtype)[..., None, :] @ states).squeeze(-2) * scale)  # [B, C, H, V]
        state = states[:, -1]
    return torch.cat(outputs, dim=1).to(
        v.dtype
    ), state.clone()  # a slice would keep a whole chunk of states alive
