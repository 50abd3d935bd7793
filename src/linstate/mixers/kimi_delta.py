"""Kimi Delta Attention (KDA): the delta rule with a decay per token and channel.

    S_t = (I - beta_t k_t k_t^T) diag(exp g_t) S_{t-1} + beta_t k_t v_t^T        o_t = S_t^T q_t
    q, k = l2norm(silu(conv(W x)))      v = silu(conv(W x))      beta = sigmoid(W_b x)
    g = -exp(A_log) softplus(W_f2 W_f1 x + dt_bias)      [H, K], A_log per head
    y = W_o (rms_norm(o) * sigmoid(W_g2 W_g1 x))

The paper's Diag(alpha_t) is ``diag(exp g_t)``. ``gate_bias`` gives W_g2 a bias (FLA's models).

Source: Kimi Team 2025, Kimi Linear, arXiv 2510.26692, sections 3 and 4.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linstate.mixers._delta import DeltaMixer
from linstate.mixers.parts import GatedRMSNorm, init_log_uniform_dt


class KimiDelta(DeltaMixer):
    """See the module. State: ``S [B, H, K, V]``, ``conv [B, W - 1, 2 H K + H V]``."""

    equation = "S_t = (I - b k k^T) diag(exp g) S_{t-1} + b k v^T, g per channel"
    source = "Kimi Linear 2025, arXiv 2510.26692"

    def __init__(
        self,
        d_model: int,
        num_heads: int | None = None,
        head_dim: int = 64,
        v_head_dim: int | None = None,
        conv_width: int = 4,
        gate_rank: int | None = None,
        negative_eigenvalues: bool = False,
        norm_eps: float = 1e-5,
        gate_bias: bool = False,
    ) -> None:
        super().__init__(d_model, num_heads, head_dim, None, v_head_dim, conv_width, negative_eigenvalues)
        rank = self.v_dim if gate_rank is None else gate_rank
        norm = GatedRMSNorm(self.v_dim, norm_eps, gate="sigmoid")
        self.add_projections([self.hv, rank, rank], norm)  # beta, and what the two gates are widened from
        self.decay_proj = nn.Linear(rank, self.keys, bias=False)
        self.gate_proj = nn.Linear(rank, self.values, bias=gate_bias)
        self.A_log = nn.Parameter(torch.empty(self.hv).uniform_(1, 16).log())
        self.dt_bias = nn.Parameter(init_log_uniform_dt(self.keys))
        self.plan_step(decay="channel", gate="sigmoid")

    def gates(self, *projected: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        beta, f, z = projected
        return beta, self.decay_proj(f), self.gate_proj(z)
