"""mLSTM, the matrix memory of xLSTM: an exponential input gate, a forget gate per head, and a normaliser.

    C_t = exp(f_t) C_{t-1} + exp(i_t) k_t v_t^T      n_t = exp(f_t) n_{t-1} + exp(i_t) k_t
    h_t = C_t^T q_t / max(|n_t . q_t|, 1)      q = W_q x / sqrt K      k = W_k x      v = W_v x
    i = cap(W_i x + b_i)      f = logsigmoid(cap(W_f x + b_f))      cap(x) = 15 tanh(x / 15)
    y = W_o (head_norm(h) * sigmoid(W_z x))

The paper's letters are C, n, h; its C is the transpose of ours. n is the last column of S, and both are carried in
units of ``exp(m)``, m the running maximum of the gates (:mod:`linstate.mixers._exponential`); the 1 becomes
``exp(-m_t)``. The block, the cap and the layer norm over each head are those of xLSTM 7B.

Source: Beck 2024, xLSTM, arXiv 2405.04517, section 2.3 and appendix A.3; block: Beck 2025, xLSTM 7B, arXiv 2503.13427.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linstate.mixers._exponential import ExponentialMixer
from linstate.mixers.base import head_count
from linstate.mixers.parts import HeadNorm, heads
from linstate.types import LayerState, state_dtype


class MLSTM(ExponentialMixer):
    """See the module. State: ``S [B, H, K, V + 1]`` and ``m [B, H]``: C and n are ``S exp(m)``."""

    equation = "S_t = exp(f) S_{t-1} + exp(i) k v^T, f, i per head, normalised"
    source = "Beck 2024, arXiv 2405.04517"

    def __init__(
        self,
        d_model: int,
        num_heads: int | None = None,
        head_dim: int = 64,
        v_head_dim: int | None = None,
        gate_cap: float = 15.0,
        norm_eps: float = 1e-6,
        eps: float = 1e-6,
    ) -> None:
        super().__init__(d_model)
        self.k_dim, self.v_dim = head_dim, 2 * head_dim if v_head_dim is None else v_head_dim
        self.num_heads = head_count(num_heads, d_model, self.v_dim)
        self.gate_cap, self.eps = gate_cap, eps
        keys, values = self.num_heads * self.k_dim, self.num_heads * self.v_dim
        self.sizes = [keys, keys, values, values, 2 * self.num_heads]  # q, k, v, z, gates
        self.in_proj = nn.Linear(d_model, sum(self.sizes), bias=False)
        closed = torch.full((self.num_heads,), -10.0)
        # With its device: once transformers has loaded a model, `torch.device("meta")` does not reach linspace any more.
        bias = torch.cat([closed, torch.linspace(3, 6, self.num_heads, device=closed.device)])
        self.gate_bias = nn.Parameter(bias)  # the paper's: hardly any input, long memory
        self.norm = HeadNorm(self.num_heads, self.v_dim, norm_eps, bias=False)
        self.out_proj = nn.Linear(values, d_model, bias=False)

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        shared: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, LayerState]:
        *qkv, z, gates = self.in_proj(x).split(self.sizes, dim=-1)
        q, k, v = (heads(part, self.num_heads) for part in qkv)
        wide = state_dtype(x)
        gates = (gates.to(wide) + self.gate_bias.to(wide)) / self.gate_cap
        i, f = (self.gate_cap * gates.tanh()).chunk(2, dim=-1)  # [B, T, H] each
        h, n, m, after = self.attend(q, k, v, i, F.logsigmoid(f), self.k_dim**-0.5, state, cu_seqlens)
        h = h / (torch.maximum(n.abs(), (-m).exp()) + self.eps)  # [B, T, H, V]
        return self.out_proj(self.norm(h.to(v.dtype)) * z.sigmoid()), after
