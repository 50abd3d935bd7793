"""Linear Transformer: softmax replaced by a feature map, so that a sum over the past becomes a state.

    S_t = S_{t-1} + phi(k_t) v_t^T      z_t = z_{t-1} + phi(k_t)      phi(x) = elu(x) + 1
    o_t = S_t^T phi(q_t) / (z_t . phi(q_t))
    y = W_o o

The normaliser z is the last column of S: v is given a channel of ones. A scale on q cancels, so there is none.

Source: Katharopoulos, Vyas, Pappas, Fleuret 2020, Transformers are RNNs, arXiv 2006.16236, sections 3.2 and 3.4.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linstate.mixers.base import Mixer, head_count
from linstate.mixers.parts import heads
from linstate.ops import linear_attention
from linstate.ops.features import elu_plus_one
from linstate.types import LayerState


class LinearTransformer(Mixer):
    """See the module. State: ``S [B, H, K, V + 1]``."""

    recurrence = "linear_attention"
    equation = "S_t = S_{t-1} + phi(k) v^T, phi = elu + 1, normalised"
    source = "Katharopoulos 2020, arXiv 2006.16236"
    composition = "exact"

    def __init__(
        self, d_model: int, num_heads: int | None = None, head_dim: int = 64, eps: float = 1e-6
    ) -> None:
        super().__init__(d_model)
        self.num_heads, self.head_dim, self.eps = head_count(num_heads, d_model, head_dim), head_dim, eps
        self.in_proj = nn.Linear(d_model, 3 * self.num_heads * head_dim, bias=False)
        self.out_proj = nn.Linear(self.num_heads * head_dim, d_model, bias=False)

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        shared: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, LayerState]:
        q, k, v = (heads(part, self.num_heads) for part in self.in_proj(x).chunk(3, dim=-1))
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)  # [B, T, H, V + 1]
        o, matrix = linear_attention(
            elu_plus_one(q),
            elu_plus_one(k),
            v,
            scale=1.0,
            initial_state=(state or {}).get("S"),
            cu_seqlens=cu_seqlens,
        )
        o = o[..., :-1] / (o[..., -1:] + self.eps)  # [B, T, H, V]
        return self.out_proj(o.flatten(-2)), {"S": matrix}

    def init_state(self, batch: int, *, device: torch.device | str | None = None) -> LayerState:
        return {"S": self.zeros(batch, self.num_heads, self.head_dim, self.head_dim + 1, device=device)}

    def recurrence_flops(self, tokens: int) -> int:
        return tokens * self.num_heads * self.head_dim * (self.head_dim + 1) * 4
