"""Fast-weight programmer with DPFP: a slow network writes into a fast one by the delta rule, over sparse features.

    S_t = S_{t-1} + beta_t phi(k_t) (v_t - S_{t-1}^T phi(k_t))^T        o_t = S_t^T phi(q_t) / sqrt K
    phi(x) = psi / sum of psi      psi_{i, j} = r_i r_{i - j},  j = 1 .. nu      r = relu([x; -x])
    q, k, v = W x      beta = sigmoid(W_b x)      y = W_o o

The paper's W_t is the transpose of our S, its slow weights are W, d_key our K; phi has ``2 K nu`` features. It is
:mod:`linstate.mixers.deltanet` as it was first written: features normalised by their sum in place of the l2 norm, no
convolution, no norm behind. The indices i of r go round.

Source: Schlag, Irie, Schmidhuber 2021, Linear Transformers Are Secretly Fast Weight Programmers, arXiv 2102.11174,
sections 4.2 and 5.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linstate.mixers.base import Mixer, head_count
from linstate.mixers.parts import heads
from linstate.ops import delta_rule
from linstate.ops.features import dpfp, sum_norm
from linstate.types import LayerState


class DPFP(Mixer):
    """See the module. State: ``S [B, H, 2 K nu, V]``."""

    recurrence = "delta_rule"
    equation = "S_t = S_{t-1} + b phi(k) (v - S_{t-1}^T phi(k))^T, phi = DPFP / sum"
    source = "Schlag 2021, arXiv 2102.11174"

    def __init__(
        self, d_model: int, num_heads: int | None = None, head_dim: int = 64, nu: int = 1, eps: float = 1e-6
    ) -> None:
        super().__init__(d_model)
        self.num_heads, self.head_dim = head_count(num_heads, d_model, head_dim), head_dim
        self.nu, self.eps = nu, eps
        inner = self.num_heads * head_dim
        self.sizes = [inner, inner, inner, self.num_heads]  # q, k, v, beta
        self.in_proj = nn.Linear(d_model, sum(self.sizes), bias=False)
        self.out_proj = nn.Linear(inner, d_model, bias=False)

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        shared: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, LayerState]:
        *qkv, beta = self.in_proj(x).split(self.sizes, dim=-1)
        q, k, v = (heads(part, self.num_heads) for part in qkv)
        q, k = (sum_norm(dpfp(part, self.nu), self.eps) for part in (q, k))  # [B, T, H, 2 K nu]
        o, matrix = delta_rule(
            q,
            k,
            v,
            beta.sigmoid(),
            scale=self.head_dim**-0.5,
            initial_state=(state or {}).get("S"),
            cu_seqlens=cu_seqlens,
        )
        return self.out_proj(o.flatten(-2)), {"S": matrix}

    def init_state(self, batch: int, *, device: torch.device | str | None = None) -> LayerState:
        features = 2 * self.head_dim * self.nu
        return {"S": self.zeros(batch, self.num_heads, features, self.head_dim, device=device)}

    def recurrence_flops(self, tokens: int) -> int:
        return tokens * self.num_heads * 2 * self.head_dim * self.nu * (self.head_dim * 6 + 2)
