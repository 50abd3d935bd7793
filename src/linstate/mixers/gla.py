"""Gated linear attention (GLA): linear attention with a decay per token and channel.

    S_t = diag(exp g_t) S_{t-1} + k_t v_t^T      o_t = S_t^T q_t
    q, k, v = W x      g = logsigmoid(W_2 W_1 x + b) / 16
    y = W_o (rms_norm(o) * silu(W_z x))

The paper's alpha_t is ``exp(g_t)``, its r_t the output gate, its tau the 16.

Source: Yang, Wang, Shen, Panda, Kim 2023, Gated Linear Attention Transformers, arXiv 2312.06635, section 4.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linstate.mixers._planned import PlannedMixer
from linstate.mixers.base import head_count
from linstate.mixers.parts import GatedRMSNorm, LowRank
from linstate.ops.fused import Operands, Plan
from linstate.types import LayerState


class GLA(PlannedMixer):
    """See the module. State: ``S [B, H, K, V]``."""

    recurrence = "linear_attention"
    equation = "S_t = diag(exp g) S_{t-1} + k v^T, g per channel"
    source = "Yang 2023, arXiv 2312.06635"

    def __init__(
        self,
        d_model: int,
        num_heads: int | None = None,
        head_dim: int = 64,
        v_head_dim: int | None = None,
        gate_rank: int = 16,
        gate_divisor: float = 16.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(d_model)
        self.k_dim, self.v_dim = head_dim, 2 * head_dim if v_head_dim is None else v_head_dim
        self.num_heads = head_count(num_heads, d_model, self.v_dim)
        self.gate_divisor = gate_divisor
        keys, values = self.num_heads * self.k_dim, self.num_heads * self.v_dim
        self.sizes = [keys, keys, values, values]  # q, k, v, z
        self.in_proj = nn.Linear(d_model, sum(self.sizes), bias=False)
        self.decay_proj = LowRank(d_model, keys, gate_rank, bias=True)
        self.norm = GatedRMSNorm(self.v_dim, norm_eps)
        self.out_proj = nn.Linear(values, d_model, bias=False)
        self.plan = Plan(
            recurrence="linear_attention",
            hk=self.num_heads,
            hv=self.num_heads,
            k=self.k_dim,
            v=self.v_dim,
            q_at=0,
            k_at=keys,
            v_at=2 * keys,
            scale=self.k_dim**-0.5,
            norm_eps=norm_eps,
            decay="sigmoid",
            divisor=gate_divisor,
            gate="silu",
        )

    def project(
        self, x: Tensor, state: LayerState, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Operands, LayerState]:
        projected = self.in_proj(x)  # q, k, v, z
        z = projected[..., -self.sizes[3] :]
        return projected, Operands(step=self.decay_proj(x), norm=self.norm.weight, z=z), {}

    def init_state(self, batch: int, *, device: torch.device | str | None = None) -> LayerState:
        return {"S": self.zeros(batch, self.num_heads, self.k_dim, self.v_dim, device=device)}

    def recurrence_flops(self, tokens: int) -> int:
        return tokens * self.num_heads * self.k_dim * self.v_dim * 5
