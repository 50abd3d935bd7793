"""Linear attention by chunks of matmuls.

With G the sum of log gates inside the chunk and S the state before it:

    o_i = (exp(G_i) q_i)^T S + sum_{j <= i} (q_i . exp(G_i - G_j) k_j) v_j
    S'  = diag(exp G_C) S + sum_j (exp(G_C - G_j) k_j) v_j^T

With a bonus u, row i reads before its own token: G_{i-1} in place of G_i, j < i, and u on the diagonal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linstate.ops.chunks import by_segments, decay, from_chunks, to_chunks
from linstate.ops.dispatch import begin_state, expand_heads, register
from linstate.types import state_dtype


@register("linear_attention", "chunked", "torch")
def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    bonus: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See the module; arguments as in :func:`linstate.ops.linear_attention`."""
    dtype = state_dtype(q, k, v)
    heads = v.shape[2]
    state = begin_state(initial_state, k, v)
    if v.shape[1] == 0:
        return torch.zeros_like(v), state
    after = bonus is None

    def core(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
        tokens = v.shape[1]
        q, k = expand_heads(heads, q, k)
        if g is not None:
            (g,) = expand_heads(heads, g)
        qc, kc, vc = (
            to_chunks(q, dtype) * scale,
            to_chunks(k, dtype),
            to_chunks(v, dtype),
        )  # [B, H, N, C, K or V]
        gates = decay(None if g is None else to_chunks(g, dtype))
        scores = gates.scores(qc, kc, before=not after)  # [B, H, N, C, C]
        if bonus is not None:
            scores = scores + torch.diag_embed((qc * bonus.to(dtype)[:, None, None] * kc).sum(-1))
        within = scores @ vc  # [B, H, N, C, V]
        reads = gates.from_start(qc, before=not after).unbind(2)  # N x [B, H, C, K]
        writes = (gates.to_end(kc).transpose(-1, -2) @ vc).unbind(2)  # N x [B, H, K, V]
        total = gates.total()
        totals = (None,) * len(reads) if total is None else total.unbind(2)
        outputs = []
        for read, write, factor in zip(reads, writes, totals, strict=True):
            outputs.append(read @ state)
            state = write + (state if factor is None else factor * state)
        return from_chunks(within + torch.stack(outputs, dim=2), tokens, v.dtype), state

    return by_segments(core, {"q": q, "k": k, "v": v, "g": g}, state)
