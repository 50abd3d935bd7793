"""What the mixers of lightning attention share: a decay fixed for each head and layer, and a gated norm over all heads.

    S_t = exp(g_h) S_{t-1} + k_t v_t^T      o_t = S_t^T q_t      y = W_o (rms_norm(o) * gate(W_u x))
    g_h = -2^(-8 h / H) (1 - layer / (layers - 1)),  h = 1 .. H

q, k, v are made by the siblings. g falls to nothing with depth; it is that of the authors' code (Qin 2023, arXiv
2307.14995, has exp in place of the power of two), which keeps 1e-5 of it in the last layer.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from linstate.mixers.base import Mixer, Place, head_count
from linstate.mixers.parts import RMSNorm, heads
from linstate.ops import linear_attention
from linstate.types import LayerState, state_dtype


class LightningMixer(Mixer):
    """See the module. State: ``S [B, H, K, V]``."""

    recurrence = "linear_attention"
    depth_eps: ClassVar[float] = 0.0
    """Added to ``layers - 1``: counts in the last layer only, whose decay is almost nothing."""

    def __init__(
        self,
        d_model: int,
        num_heads: int | None,
        head_dim: int,
        norm_eps: float,
        place: Place,
        *,
        norm_weight: bool,
    ) -> None:
        super().__init__(d_model)
        self.num_heads, self.k_dim, self.v_dim = head_count(num_heads, d_model, head_dim), head_dim, head_dim
        self.place = place
        inner = self.num_heads * head_dim
        self.in_proj = nn.Linear(d_model, 4 * inner, bias=False)  # q, k, v, u
        self.norm = RMSNorm(inner, norm_eps, weight=norm_weight)
        self.out_proj = nn.Linear(inner, d_model, bias=False)

    @abstractmethod
    def qkvu(
        self, q: Tensor, k: Tensor, v: Tensor, u: Tensor, state: LayerState, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, LayerState]:
        """The projections ``[B, T, H, K]`` activated and turned, and what the state holds beside S."""

    def decay(self, like: Tensor) -> Tensor:
        """g ``[H]``."""
        depth = 1 - self.place.layer / (max(1, self.place.layers - 1) + self.depth_eps) + 1e-5
        head = torch.arange(1, self.num_heads + 1, device=like.device, dtype=torch.float64)
        return (-(2.0 ** (-8 * head / self.num_heads)) * depth).to(state_dtype(like))

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        shared: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, LayerState]:
        state = state or {}
        q, k, v, u = (heads(part, self.num_heads) for part in self.in_proj(x).chunk(4, dim=-1))
        q, k, v, u, after = self.qkvu(q, k, v, u, state, cu_seqlens)
        o, matrix = linear_attention(
            q, k, v, self.decay(x), scale=1.0, initial_state=state.get("S"), cu_seqlens=cu_seqlens
        )
        return self.out_proj(self.norm(o.flatten(-2)) * u.flatten(-2)), {"S": matrix, **after}

    def init_state(self, batch: int, *, device: torch.device | str | None = None) -> LayerState:
        return {"S": self.zeros(batch, self.num_heads, self.k_dim, self.v_dim, device=device)}

    def recurrence_flops(self, tokens: int) -> int:
        return tokens * self.num_heads * self.k_dim * self.v_dim * 5
