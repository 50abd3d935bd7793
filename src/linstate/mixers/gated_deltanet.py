"""Gated DeltaNet: the delta rule with a decay per token and head.

    S_t = (I - beta_t k_t k_t^T) exp(g_t) S_{t-1} + beta_t k_t v_t^T        o_t = S_t^T q_t
    q, k = l2norm(silu(conv(W x)))      v = silu(conv(W x))
    beta = sigmoid(W_b x)               g = -exp(A_log) softplus(W_a x + dt_bias)
    y = W_o (rms_norm(o) * silu(W_z x))

The paper's alpha_t is ``exp(g_t)``, its S is the transpose of ours. Grouped heads: ``num_v_heads`` a multiple
of ``num_heads`` (Qwen3-Next). ``decay_range`` and ``dt_range``: exp(A_log) and softplus(dt_bias) are drawn from these
at first, so a head begins by forgetting over about 1 / (A dt) tokens.

Source: Yang, Kautz, Hatamizadeh 2024, Gated Delta Networks, arXiv 2412.06464, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linstate.mixers._delta import DeltaMixer
from linstate.mixers.parts import GatedRMSNorm, init_log_uniform_dt


class GatedDeltaNet(DeltaMixer):
    """See the module. State: ``S [B, Hv, K, V]``, ``conv [B, W - 1, 2 Hk K + Hv V]``."""

    equation = "S_t = (I - b k k^T) exp(g) S_{t-1} + b k v^T, g per head"
    source = "Yang 2024, arXiv 2412.06464"

    def __init__(
        self,
        d_model: int,
        num_heads: int | None = None,
        head_dim: int = 64,
        num_v_heads: int | None = None,
        v_head_dim: int | None = None,
        conv_width: int = 4,
        negative_eigenvalues: bool = False,
        norm_eps: float = 1e-6,
        decay_range: tuple[float, float] = (1.0, 16.0),
        dt_range: tuple[float, float] = (1e-3, 0.1),
    ) -> None:
        super().__init__(
            d_model, num_heads, head_dim, num_v_heads, v_head_dim, conv_width, negative_eigenvalues
        )
        self.add_projections(
            [self.values, self.hv, self.hv], GatedRMSNorm(self.v_dim, norm_eps)
        )  # z, beta, a
        self.A_log = nn.Parameter(torch.empty(self.hv).uniform_(*decay_range).log())
        self.dt_bias = nn.Parameter(init_log_uniform_dt(self.hv, *dt_range))
        self.plan_step(decay="head", gate="silu")

    def gates(self, *projected: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        z, beta, a = projected
        return beta, a, z
