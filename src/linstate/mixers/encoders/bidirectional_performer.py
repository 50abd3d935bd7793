"""Bidirectional Performer: softmax attention without a mask, estimated without bias by random positive features.

    phi(x)_i = exp(w_i . x - |x|^2 / 2)      w_i ~ Normal(0, 1), orthogonal in blocks      q, k = K^-1/4 W x

Everything else as in :mod:`linstate.mixers.encoders._bidirectional`. The largest logarithm of a query, and of all keys
of a text and head, cancels in o and is taken out before ``exp``. :meth:`redraw` draws w anew.

Source: Choromanski 2021, Rethinking Attention with Performers, arXiv 2009.14794, sections 2.2 to 2.4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from linstate.mixers.encoders._bidirectional import BidirectionalMixer
from linstate.ops.features import log_favor, orthogonal_gaussian


class BidirectionalPerformer(BidirectionalMixer):
    """See the module. ``num_features`` is the paper's m, by default ``K log K``."""

    equation = "y = phi(Q) (phi(K)^T V) / phi(Q) sum phi(K), phi = exp(w . x - x . x / 2), w random"
    source = "Choromanski 2021, arXiv 2009.14794"

    def __init__(
        self,
        d_model: int,
        max_length: int,
        num_heads: int | None = None,
        head_dim: int = 64,
        num_features: int | None = None,
        eps: float = 1e-9,
    ) -> None:
        super().__init__(d_model, num_heads, head_dim, eps)
        self.features = round(head_dim * math.log(head_dim)) if num_features is None else num_features
        self.w: Tensor
        self.register_buffer("w", torch.empty(self.features, head_dim))
        self.redraw()

    @torch.no_grad()
    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Draw other features."""
        self.w.copy_(orthogonal_gaussian(*self.w.shape, like=self.w, generator=generator))

    def phi(self, q: Tensor, k: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        q, k = (log_favor(x * self.head_dim**-0.25, self.w.to(x.dtype)) for x in (q, k))  # [B, H, T, M]
        most = k.masked_fill(~keep, float("-inf")).amax((-2, -1), keepdim=True)  # [B, H, 1, 1]
        # a key that does not count may have a larger logarithm: it is left out, but not before exp
        return (q - q.amax(-1, keepdim=True)).exp(), (k - most).clamp(max=0).exp()
