"""RWKV-5 "Eagle", its time mix: linear attention with a learned decay for each channel and a bonus for the newest token.

    o_t = (S_{t-1} + diag(u) k_t v_t^T)^T r_t      S_t = diag(exp g) S_{t-1} + k_t v_t^T      g = -exp(decay)
    x_i = lerp(x_t, x_{t-1}, mu_i),  i in r, k, v, g

The rest is in :mod:`linstate.mixers._rwkv`. The paper's w is ``exp(g)``, its state ``wkv`` is ours.

Source: Peng 2024, Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence, arXiv 2404.05892, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linstate.mixers._rwkv import RWKVMixer
from linstate.mixers.base import ALONE, Place


class RWKV5(RWKVMixer):
    """See the module. State: ``S [B, H, K, K]``, ``shift [B, 1, D]``."""

    equation = "S_t = diag(exp g) S_{t-1} + k v^T, read before with a bonus u, g fixed per channel"
    source = "Peng 2024, arXiv 2404.05892"

    def __init__(
        self,
        d_model: int,
        num_heads: int | None = None,
        head_dim: int = 64,
        norm_eps: float | None = None,
        *,
        place: Place = ALONE,
    ) -> None:
        super().__init__(d_model, num_heads, head_dim, norm_eps, place, mixed=4)

    def mixed(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        r, k, v, gate = (torch.lerp(x, before, mix) for mix in self.mix)
        return r, k, v, gate, None
