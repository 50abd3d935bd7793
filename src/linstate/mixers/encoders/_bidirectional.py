"""What the bidirectional linear attentions share: one state of the whole text, which every token reads.

    S = sum_s phi(k_s) v_s^T      z = sum_s phi(k_s)      o_t = S^T phi(q_t) / (z . phi(q_t))      y = W_o o

Sums are over the tokens that count. They differ in phi.
"""

from __future__ import annotations

from abc import abstractmethod

import torch.nn.functional as F
from torch import Tensor, nn

from linstate.mixers.base import head_count
from linstate.mixers.encoders.base import EncoderMixer, counted
from linstate.mixers.parts import heads
from linstate.types import state_dtype


class BidirectionalMixer(EncoderMixer):
    """See the module."""

    features: int
    """Channels of phi."""

    def __init__(self, d_model: int, num_heads: int | None, head_dim: int, eps: float) -> None:
        super().__init__(d_model)
        self.num_heads, self.head_dim, self.eps = head_count(num_heads, d_model, head_dim), head_dim, eps
        self.in_proj = nn.Linear(d_model, 3 * self.num_heads * head_dim, bias=False)
        self.out_proj = nn.Linear(self.num_heads * head_dim, d_model, bias=False)

    @abstractmethod
    def phi(self, q: Tensor, k: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``[B, H, T, M]`` of ``q, k [B, H, T, K]``; ``keep [B or 1, 1, T, 1]`` says which k count."""

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        wide = state_dtype(x)
        q, k, v = (
            heads(part, self.num_heads).transpose(1, 2).to(wide) for part in self.in_proj(x).chunk(3, dim=-1)
        )
        keep = counted(x, lengths)[:, None, :, None]  # [B or 1, 1, T, 1]
        q, k = self.phi(q, k, keep)
        matrix = k.masked_fill(~keep, 0.0).transpose(-1, -2) @ F.pad(
            v.masked_fill(~keep, 0.0), (0, 1), value=1.0
        )  # [B, H, M, V + 1], z the last column
        o = q @ matrix
        o = o[..., :-1] / (o[..., -1:] + self.eps)
        return self.out_proj(o.transpose(1, 2).flatten(-2).to(x.dtype))
