"""Linformer: softmax attention over k mixtures of the keys and values, so that it is linear in the text.

    y = W_o concat_h softmax(Q_h (E K_h)^T / sqrt d) (F V_h)      Q, K, V = W x

E and F are learned, ``[k, n]`` for texts of at most n tokens, the same for all heads (the paper's headwise sharing), and
one matrix with ``share_kv`` (its key-value sharing). Tokens that do not count are zero in K and V.

Source: Wang, Li, Khabsa, Fang, Ma 2020, Linformer, arXiv 2006.04768, section 4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linstate.errors import ConfigError
from linstate.mixers.base import head_count
from linstate.mixers.encoders.base import EncoderMixer, counted
from linstate.mixers.parts import heads


class Linformer(EncoderMixer):
    """See the module. ``projected`` is the paper's k, ``max_length`` its n."""

    equation = "y = softmax(Q (E K)^T / sqrt d) (F V)"
    source = "Wang 2020, arXiv 2006.04768"

    def __init__(
        self,
        d_model: int,
        max_length: int,
        projected: int = 64,
        num_heads: int | None = None,
        head_dim: int = 64,
        share_kv: bool = False,
    ) -> None:
        super().__init__(d_model)
        if projected < 1:
            raise ConfigError(f"projected must be at least 1, got {projected}")
        self.num_heads, self.head_dim = head_count(num_heads, d_model, head_dim), head_dim
        self.projected = projected
        self.in_proj = nn.Linear(d_model, 3 * self.num_heads * head_dim, bias=False)
        self.E = nn.Parameter(torch.randn(projected, max_length) * max_length**-0.5)
        self.F = None if share_kv else nn.Parameter(torch.randn(projected, max_length) * max_length**-0.5)
        self.out_proj = nn.Linear(self.num_heads * head_dim, d_model, bias=False)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        q, k, v = (heads(part, self.num_heads).transpose(1, 2) for part in self.in_proj(x).chunk(3, dim=-1))
        drop = ~counted(x, lengths)[:, None, :, None]  # [B, 1, T, 1]
        k, v = k.masked_fill(drop, 0.0), v.masked_fill(drop, 0.0)  # [B, H, T, K]
        for_keys = self.E[:, : x.shape[1]]  # [k, T]
        for_values = for_keys if self.F is None else self.F[:, : x.shape[1]]
        o = F.scaled_dot_product_attention(q, for_keys @ k, for_values @ v)  # over [B, H, k, K]
        return self.out_proj(o.transpose(1, 2).flatten(-2))
