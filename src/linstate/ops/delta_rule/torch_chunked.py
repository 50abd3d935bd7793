"""The delta rule by chunks of matmuls (the WY form).

With G the sum of log gates inside the chunk, S the state before it, and u_j = beta_j (v_j - what the
state answered to k_j) the change that token j writes:

    u_i = beta_i (v_i - (exp(G_i) k_i)^T S - sum_{j < i} (k_i . exp(G_i - G_j) k_j) u_j)

a unit lower triangular system, ``(I + diag(beta) A) U = diag(beta) (V - K' S)``. Its inverse does not
depend on S, so it is made for all chunks at once; the loop over chunks is left with four matmuls:

    U  = T (V - K' S),  T = (I + diag(beta) A)^-1 diag(beta)
    o  = Q' S + A_qk U
    S' = diag(exp G_C) S + sum_j (exp(G_C - G_j) k_j) u_j^T
"""

from __future__ import annotations

import torch
from torch import Tensor

from linstate.ops.chunks import by_segments, decay, from_chunks, to_chunks, unit_lower_inverse
from linstate.ops.dispatch import begin_state, expand_heads, register
from linstate.types import state_dtype


@register("delta_rule", "chunked", "torch")
def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See the module; arguments as in :func:`linstate.ops.delta_rule`."""
    dtype = state_dtype(q, k, v)
    heads = v.shape[2]
    state = begin_state(initial_state, k, v)
    if v.shape[1] == 0:
        return torch.zeros_like(v), state

    def core(
        q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        tokens = v.shape[1]
        q, k = expand_heads(heads, q, k)
        if g is not None:
            (g,) = expand_heads(heads, g)
        qc, kc, vc = (
            to_chunks(q, dtype) * scale,
            to_chunks(k, dtype),
            to_chunks(v, dtype),
        )  # [B, H, N, C, K or V]
        bc = to_chunks(beta, dtype)  # [B, H, N, C]
        gates = decay(None if g is None else to_chunks(g, dtype))
        overlap = gates.scores(kc, kc, diagonal=False)  # [B, H, N, C, C]
        solve = (unit_lower_inverse(bc[..., None] * overlap) * bc[..., None, :]).unbind(2)
        attend = gates.scores(qc, kc).unbind(2)
        reads = torch.cat([gates.from_start(kc), gates.from_start(qc)], dim=-2).unbind(2)  # N x [B, H, 2C, K]
        writes = gates.to_end(kc).transpose(-1, -2).unbind(2)  # N x [B, H, K, C]
        total = gates.total()
        totals = (None,) * len(reads) if total is None else total.unbind(2)
        outputs = []
        for n, values in enumerate(vc.unbind(2)):
            known, seen = (reads[n] @ state).chunk(2, dim=-2)  # [B, H, C, V] each
            change = solve[n] @ (values - known)
            outputs.append(seen + attend[n] @ change)
            factor = totals[n]
            state = writes[n] @ change + (state if factor is None else factor * state)
        return from_chunks(torch.stack(outputs, dim=2), tokens, v.dtype), state

    return by_segments(core, {"q": q, "k": k, "v": v, "beta": beta, "g": g}, state)
