"""RWKV-6 "Finch", its time mix: RWKV-5 in which the token tells how much of the one before it mixes in, and the decay.

    o_t = (S_{t-1} + diag(u) k_t v_t^T)^T r_t      S_t = diag(exp g_t) S_{t-1} + k_t v_t^T
    x_i = lerp(x_t, x_{t-1}, mu_i + A_i tanh(B_i lerp(x_t, x_{t-1}, mu_x))),  i in r, k, v, g, w
    g = -exp(decay + W_2 tanh(W_1 x_w))

The rest is in :mod:`linstate.mixers._rwkv`. The paper's w_t is ``exp(g_t)``, its ddlerp is x_i, its lora the low-rank
maps; the B_i are one projection.

Source: Peng 2024, Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence, arXiv 2404.05892, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linstate.mixers._rwkv import RWKVMixer
from linstate.mixers.base import ALONE, Place
from linstate.mixers.parts import LowRank, heads


class RWKV6(RWKVMixer):
    """See the module. State: ``S [B, H, K, K]``, ``shift [B, 1, D]``."""

    equation = "S_t = diag(exp g) S_{t-1} + k v^T, read before with a bonus u, g per channel"
    source = "Peng 2024, arXiv 2404.05892"

    def __init__(
        self,
        d_model: int,
        num_heads: int | None = None,
        head_dim: int = 64,
        mix_rank: int = 32,
        decay_rank: int = 64,
        norm_eps: float | None = None,
        *,
        place: Place = ALONE,
    ) -> None:
        super().__init__(d_model, num_heads, head_dim, norm_eps, place, mixed=6)
        self.mix_narrow = nn.Linear(d_model, 5 * mix_rank, bias=False)
        self.mix_widen = nn.Parameter(torch.empty(5, d_model, mix_rank).uniform_(-0.01, 0.01))
        self.decay_lora = LowRank(d_model, self.num_heads * head_dim, decay_rank, torch.tanh)
        with torch.no_grad():
            self.decay_lora.widen.weight.uniform_(-0.01, 0.01)
        for projection in (self.mix_narrow, self.decay_lora.narrow):
            nn.init.zeros_(projection.weight)
        for projection in (self.mix_narrow, self.decay_lora.narrow, self.decay_lora.widen):
            projection.keep_init = True  # type: ignore[assignment]

    def mixed(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        inner = self.mix_narrow(torch.lerp(x, before, self.mix[5])).tanh()  # [B, T, 5 rank]
        rates = torch.einsum("btir,idr->ibtd", heads(inner, 5), self.mix_widen) + self.mix[:5, None, None]
        r, k, v, gate, w = torch.lerp(x, before, rates)  # [B, T, D] each
        return r, k, v, gate, self.decay_lora(w)
