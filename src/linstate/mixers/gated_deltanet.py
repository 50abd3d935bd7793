"""Gated DeltaNet: the delta rule with a decay per token and head.

    S_t = (I - beta_t k_t k_t^T) exp(g_t) S_{t-1} + beta_t k_t v_t^T        o_t = S_t^T q_t
    q, k = l2norm(silu(conv(W x)))      v = silu(conv(W x))
    beta = sigmoid(W_b x)               g = -exp(A_log) softplus(W_a x + dt_bias)
    y = W_o (rms_norm(o) * silu(W_z x))

The paper's alpha_t is ``exp(g_t)``. Grouped heads: ``num_v_heads`` a multiple of ``num_heads`` (Qwen3-Next).

Source: Yang, Kautz, Hatamizadeh 2024, Gated Delta Networks, arXiv 2412.06464, section 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linstate.mixers.base import Mixer
from linstate.mixers.parts import GatedRMSNorm, ShortConvolution, heads, init_log_uniform_dt, state_dtype_of
from linstate.ops import delta_rule
from linstate.ops.features import l2_norm
from linstate.types import LayerState


class GatedDeltaNet(Mixer):
    """See the module. State: ``S [B, Hv, K, V]``, ``conv [B, W - 1, 2 Hk K + Hv V]``."""

    recurrence = "delta_rule"
    equation = "S_t = (I - b k k^T) exp(g) S_{t-1} + b k v^T, g per head"
    source = "Yang 2024, arXiv 2412.06464"

    def __init__(
        self,
        d_model: int,
        num_heads: int = 4,
        head_dim: int = 64,
        num_v_heads: int | None = None,
        v_head_dim: int | None = None,
        conv_width: int = 4,
        negative_eigenvalues: bool = False,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__(d_model)
        self.hk, self.hv = num_heads, num_v_heads or num_heads
        self.k_dim, self.v_dim = head_dim, v_head_dim or head_dim
        self.beta_scale = 2.0 if negative_eigenvalues else 1.0
        keys, values = self.hk * self.k_dim, self.hv * self.v_dim
        self.sizes = [2 * keys + values, values, self.hv, self.hv]  # qkv, z, beta, a
        self.qkv_sizes = [keys, keys, values]
        self.in_proj = nn.Linear(d_model, sum(self.sizes), bias=False)
        self.conv = ShortConvolution(2 * keys + values, conv_width)
        self.A_log = nn.Parameter(torch.empty(self.hv).uniform_(1, 16).log())
        self.dt_bias = nn.Parameter(init_log_uniform_dt(self.hv))
        self.norm = GatedRMSNorm(self.v_dim, norm_eps)
        self.out_proj = nn.Linear(values, d_model, bias=False)

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        shared: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, LayerState]:
        state = state or {}
        qkv, z, beta, a = self.in_proj(x).split(self.sizes, dim=-1)
        qkv, tail = self.conv(qkv, state.get("conv"), cu_seqlens)
        q, k, v = qkv.split(self.qkv_sizes, dim=-1)
        wide = state_dtype_of(x)
        g = -self.A_log.to(wide).exp() * F.softplus(a.to(wide) + self.dt_bias.to(wide))  # [B, T, Hv]
        o, matrix = delta_rule(
            l2_norm(heads(q, self.hk)),
            l2_norm(heads(k, self.hk)),
            heads(v, self.hv),
            beta.sigmoid() * self.beta_scale,
            g,
            initial_state=state.get("S"),
            cu_seqlens=cu_seqlens,
        )
        y = self.norm(o, heads(z, self.hv)).flatten(-2)  # [B, T, Hv * V]
        return self.out_proj(y), {"S": matrix, "conv": tail}

    def init_state(self, batch: int, *, device: torch.device | str | None = None) -> LayerState:
        device = device or self.device
        matrix = torch.zeros(batch, self.hv, self.k_dim, self.v_dim, device=device, dtype=state_dtype_of(self.A_log))
        return {"S": matrix, "conv": self.conv.init_state(batch, device)}

    def recurrence_flops(self, tokens: int) -> int:
        return tokens * self.hv * self.k_dim * self.v_dim * 7
