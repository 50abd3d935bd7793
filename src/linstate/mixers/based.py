"""Based: linear attention whose features are the exponential's Taylor polynomial, to stand between sliding windows.

    S_t = S_{t-1} + phi(k_t) v_t^T      z_t = z_{t-1} + phi(k_t)      o_t = S_t^T phi(q_t) / (z_t . phi(q_t))
    phi(q) . phi(k) = 1 + s + s^2 / 2      s = q . k / sqrt d      q, k, v = W x      y = W_o o

The paper's d' is d, the small size of q and k (``feature_dim``, 16); phi has K = 1 + d + d (d + 1) / 2 features. The
normaliser z is the last column of S, as in :mod:`linstate.mixers.linear_transformer`. The paper's model puts these
layers beside exact attention over a short window: ``pattern=("based", "sliding_window")``.

Source: Arora 2024, Simple linear attention language models balance the recall-throughput tradeoff, arXiv 2402.18668,
section 4.1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linstate.mixers.base import Mixer, head_count
from linstate.mixers.parts import heads
from linstate.ops import linear_attention
from linstate.ops.features import taylor_exp
from linstate.types import LayerState


class Based(Mixer):
    """See the module. State: ``S [B, H, K, V + 1]``."""

    recurrence = "linear_attention"
    equation = "S_t = S_{t-1} + phi(k) v^T, phi(q) . phi(k) = 1 + s + s^2 / 2, normalised"
    source = "Arora 2024, arXiv 2402.18668"
    composition = "exact"

    def __init__(
        self,
        d_model: int,
        num_heads: int | None = None,
        head_dim: int = 64,
        feature_dim: int = 16,
        eps: float = 1e-6,
    ) -> None:
        super().__init__(d_model)
        self.num_heads, self.v_dim, self.eps = head_count(num_heads, d_model, head_dim), head_dim, eps
        self.feature_dim, self.k_dim = feature_dim, 1 + feature_dim + feature_dim * (feature_dim + 1) // 2
        narrow = self.num_heads * feature_dim
        self.sizes = [narrow, narrow, self.num_heads * head_dim]  # q, k, v
        self.in_proj = nn.Linear(d_model, sum(self.sizes), bias=False)
        self.out_proj = nn.Linear(self.num_heads * head_dim, d_model, bias=False)

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        shared: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, LayerState]:
        q, k, v = (heads(part, self.num_heads) for part in self.in_proj(x).split(self.sizes, dim=-1))
        q, k = (taylor_exp(part * self.feature_dim**-0.25) for part in (q, k))  # [B, T, H, K]
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)  # [B, T, H, V + 1]
        o, matrix = linear_attention(
            q, k, v, scale=1.0, initial_state=(state or {}).get("S"), cu_seqlens=cu_seqlens
        )
        o = o[..., :-1] / (o[..., -1:] + self.eps)  # [B, T, H, V]
        return self.out_proj(o.flatten(-2)), {"S": matrix}

    def init_state(self, batch: int, *, device: torch.device | str | None = None) -> LayerState:
        return {"S": self.zeros(batch, self.num_heads, self.k_dim, self.v_dim + 1, device=device)}

    def recurrence_flops(self, tokens: int) -> int:
        return tokens * self.num_heads * self.k_dim * (4 * (self.v_dim + 1) + 4)
