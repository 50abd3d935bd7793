"""Performer: softmax attention estimated without bias by random positive features (FAVOR+), so that it has a state.

    S_t = S_{t-1} + phi(k_t) v_t^T      z_t = z_{t-1} + phi(k_t)      o_t = S_t^T phi(q_t) / (z_t . phi(q_t))
    phi(x)_i = exp(w_i . x - |x|^2 / 2)      w_i ~ Normal(0, 1), orthogonal in blocks
    q = K^-1/4 W_q x      k = K^-1/4 W_k x      v = W_v x      y = W_o o

``E phi(q) . phi(k) = M exp(q . k)``, the M features' mean error falling as 1 / sqrt M. The paper's m is our M, its
omega our w. Features are made as logarithms; the largest of a query cancels in o, the largest of a key is carried as
the input gate of a running maximum (:mod:`linstate.mixers._exponential`), so that nothing overflows or fades out.
:meth:`Performer.redraw` draws w anew, between steps of training; states belong to the w they were made with.

Source: Choromanski 2021, Rethinking Attention with Performers, arXiv 2009.14794, sections 2.3 and 2.4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from linstate.mixers._exponential import ExponentialMixer
from linstate.mixers.base import head_count
from linstate.mixers.parts import heads
from linstate.ops.features import log_favor, orthogonal_gaussian
from linstate.types import LayerState, state_dtype


class Performer(ExponentialMixer):
    """See the module. State: ``S [B, H, M, V + 1]`` and ``m [B, H]``: S and z of the equations are ``S exp(m)``."""

    equation = "S_t = S_{t-1} + phi(k) v^T, phi = exp(w . k - k . k / 2), w random, normalised"
    source = "Choromanski 2021, arXiv 2009.14794"
    composition = "exact"

    def __init__(
        self,
        d_model: int,
        num_heads: int | None = None,
        head_dim: int = 64,
        num_features: int | None = None,
    ) -> None:
        super().__init__(d_model)
        self.num_heads, self.v_dim = head_count(num_heads, d_model, head_dim), head_dim
        self.k_dim = round(head_dim * math.log(head_dim)) if num_features is None else num_features
        self.in_proj = nn.Linear(d_model, 3 * self.num_heads * head_dim, bias=False)
        self.out_proj = nn.Linear(self.num_heads * head_dim, d_model, bias=False)
        self.w: Tensor
        self.register_buffer("w", torch.empty(self.k_dim, head_dim))
        self.redraw()

    @torch.no_grad()
    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Draw other features; a state made before does not fit them any more."""
        self.w.copy_(orthogonal_gaussian(*self.w.shape, like=self.w, generator=generator))

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        shared: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, LayerState]:
        q, k, v = (heads(part, self.num_heads) for part in self.in_proj(x).chunk(3, dim=-1))
        wide = state_dtype(x)
        q, k = (log_favor(t.to(wide) * self.v_dim**-0.25, self.w.to(wide)) for t in (q, k))  # [B, T, H, M]
        most = k.amax(-1)  # [B, T, H]
        q = (q - q.amax(-1, keepdim=True)).exp()
        o, z, _, after = self.attend(q, (k - most[..., None]).exp(), v, most, None, 1.0, state, cu_seqlens)
        o = (o / z.clamp(min=1e-30)).to(v.dtype)  # [B, T, H, V]
        return self.out_proj(o.flatten(-2)), after

    def recurrence_flops(self, tokens: int) -> int:
        features = tokens * self.num_heads * self.k_dim * self.v_dim * 4
        return super().recurrence_flops(tokens) + features
