"""Gated linear attention (GLA): linear attention with a decay per token and channel.

    S_t = diag(exp g_t) S_{t-1} + k_t v_t^T      o_t = S_t^T q_t
    q, k, v = W x      g = logsigmoid(W_2 W_1 x + b) / 16
    y = W_o (rms_norm(o) * silu(W_z x))

The paper's alpha_t is ``exp(g_t)``, its r_t the output gate, its tau the 16.

Source: Yang, Wang, Shen, Panda, Kim 2023, Gated Linear Attention Transformers, arXiv 2312.06635, section 4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linstate.mixers.base import Mixer, head_count
from linstate.mixers.parts import GatedRMSNorm, LowRank, heads
from linstate.ops import linear_attention
from linstate.ops.native import mixer as native_mixer
from linstate.types import LayerState, state_dtype


class GLA(Mixer):
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
        self.plan = native_mixer.Plan(
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

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        shared: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, LayerState]:
        projected, logits = self.in_proj(x), self.decay_proj(x)  # q, k, v, z; [B, T, H * K]
        if native_mixer.serves(
            self.recurrence, self, projected, (state or {}).get("S"), cu_seqlens, self.plan.of_many
        ):
            z = projected[..., -self.sizes[3] :]
            y, matrix, _ = native_mixer.step(
                self.plan,
                projected,
                (state or {}).get("S"),
                step=logits,
                norm=self.norm.weight,
                z=z,
                cu_seqlens=cu_seqlens,
            )
            return self.out_proj(y), {"S": matrix}
        q, k, v, z = (heads(part, self.num_heads) for part in projected.split(self.sizes, dim=-1))
        logits = heads(logits, self.num_heads)  # [B, T, H, K]
        g = F.logsigmoid(logits.to(state_dtype(x))) / self.gate_divisor
        o, matrix = linear_attention(q, k, v, g, initial_state=(state or {}).get("S"), cu_seqlens=cu_seqlens)
        return self.out_proj(self.norm(o, z).flatten(-2)), {"S": matrix}

    def init_state(self, batch: int, *, device: torch.device | str | None = None) -> LayerState:
        return {"S": self.zeros(batch, self.num_heads, self.k_dim, self.v_dim, device=device)}

    def recurrence_flops(self, tokens: int) -> int:
        return tokens * self.num_heads * self.k_dim * self.v_dim * 5
