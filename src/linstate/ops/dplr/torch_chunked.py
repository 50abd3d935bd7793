"""The diagonal-plus-low-rank recurrence by chunks of matmuls.

With G the sum of log gates inside the chunk, S the state before it and z_i = S_{i-1}^T b_i:

    z_i = (exp(G_{i-1}) b_i)^T S + sum_{j < i} (b_i . exp(G_{i-1} - G_j) a_j) z_j + (b_i . exp(G_{i-1} - G_j) k_j) v_j

so ``(I - A_ba) Z = B' S + A_bk V``, a unit lower triangular system whose inverse does not depend on S.

    o  = Q' S + A_qa Z + A_qk V
    S' = diag(exp G_C) S + sum_j exp(G_C - G_j) (a_j z_j^T + k_j v_j^T)
"""

from __future__ import annotations

import torch
from torch import Tensor

from linstate.ops.chunks import by_segments, decay, from_chunks, to_chunks, unit_lower_inverse
from linstate.ops.dispatch import begin_state, expand_heads, register
from linstate.types import state_dtype


@register("dplr", "chunked", "torch")
def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See the module; arguments as in :func:`linstate.ops.dplr`."""
    dtype = state_dtype(q, k, v)
    heads = v.shape[2]
    state = begin_state(initial_state, k, v)
    if v.shape[1] == 0:
        return torch.zeros_like(v), state

    def core(
        q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor | None, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        tokens = v.shape[1]
        q, k, a, b = expand_heads(heads, q, k, a, b)
        if g is not None:
            (g,) = expand_heads(heads, g)
        qc, kc, vc = (
            to_chunks(q, dtype) * scale,
            to_chunks(k, dtype),
            to_chunks(v, dtype),
        )  # [B, H, N, C, K or V]
        ac, bc = to_chunks(a, dtype), to_chunks(b, dtype)
        gates = decay(None if g is None else to_chunks(g, dtype))
        solve = unit_lower_inverse(-gates.scores(bc, ac, before=True))  # [B, H, N, C, C]
        given = (solve @ (gates.scores(bc, kc, before=True) @ vc)).unbind(2)  # T A_bk V: N x [B, H, C, V]
        asked = solve @ gates.from_start(bc, before=True)  # T B': [B, H, N, C, K]
        within = (gates.scores(qc, kc) @ vc).unbind(2)
        attend = gates.scores(qc, ac).unbind(2)
        reads = torch.cat([asked, gates.from_start(qc)], dim=-2).unbind(2)  # N x [B, H, 2C, K]
        moves = gates.to_end(ac).transpose(-1, -2).unbind(2)  # N x [B, H, K, C]
        writes = (gates.to_end(kc).transpose(-1, -2) @ vc).unbind(2)  # N x [B, H, K, V]
        total = gates.total()
        totals = (None,) * len(reads) if total is None else total.unbind(2)
        outputs = []
        for n, factor in enumerate(totals):
            found, seen = (reads[n] @ state).chunk(2, dim=-2)  # [B, H, C, V] each
            found = found + given[n]
            outputs.append(seen + within[n] + attend[n] @ found)
            state = writes[n] + moves[n] @ found + (state if factor is None else factor * state)
        return from_chunks(torch.stack(outputs, dim=2), tokens, v.dtype), state

    return by_segments(core, {"q": q, "k": k, "v": v, "a": a, "b": b, "g": g}, state)
