"""What the mixers of feature maps without a decay share: attention with weights ``phi(q) . phi(k)`` that sum to one.

    S_t = S_{t-1} + phi(k_t) v_t^T      z_t = z_{t-1} + phi(k_t)      o_t = S_t^T phi(q_t) / (z_t . phi(q_t))
    q, k, v = W x      y = W_o o

The normaliser z is the last column of S: v is given a channel of ones. A scale on phi(q) cancels, so there is none. The
siblings differ in phi.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from linstate.mixers.base import Mixer, head_count
from linstate.mixers.parts import heads
from linstate.ops import linear_attention
from linstate.types import LayerState


class NormalisedMixer(Mixer):
    """See the module. State: ``S [B, H, K, V + 1]``. ``size``: channels of q and k in a head, of which phi makes ``k_dim``."""

    recurrence = "linear_attention"
    composition = "exact"

    def __init__(
        self, d_model: int, num_heads: int | None, head_dim: int, size: int, k_dim: int, eps: float
    ) -> None:
        super().__init__(d_model)
        self.num_heads, self.v_dim, self.eps = head_count(num_heads, d_model, head_dim), head_dim, eps
        self.k_dim = k_dim
        self.sizes = [self.num_heads * part for part in (size, size, head_dim)]  # q, k, v
        self.in_proj = nn.Linear(d_model, sum(self.sizes), bias=False)
        self.out_proj = nn.Linear(self.num_heads * head_dim, d_model, bias=False)

    @abstractmethod
    def phi(self, x: Tensor) -> Tensor:
        """Features ``[B, T, H, K]`` of queries or keys ``[B, T, H, size]``, with products >= 0."""

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        shared: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, LayerState]:
        q, k, v = (heads(part, self.num_heads) for part in self.in_proj(x).split(self.sizes, dim=-1))
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)  # [B, T, H, V + 1]
        o, matrix = linear_attention(
            self.phi(q),
            self.phi(k),
            v,
            scale=1.0,
            initial_state=(state or {}).get("S"),
            cu_seqlens=cu_seqlens,
        )
        o = o[..., :-1] / (o[..., -1:] + self.eps)  # [B, T, H, V]
        return self.out_proj(o.flatten(-2)), {"S": matrix}

    def init_state(self, batch: int, *, device: torch.device | str | None = None) -> LayerState:
        return {"S": self.zeros(batch, self.num_heads, self.k_dim, self.v_dim + 1, device=device)}

    def recurrence_flops(self, tokens: int) -> int:
        return tokens * self.num_heads * self.k_dim * (self.v_dim + 1) * 4
