"""HGRN2: a gated recurrence whose keys are what its forget gates leave free, so that its state costs no weights.

    S_t = diag(f_t) S_{t-1} + (1 - f_t) v_t^T      o_t = S_t^T q_t
    q = silu(W_q x)      f = floor + (1 - floor) sigmoid(W_f x)      v = W_v x
    y = W_o rms_norm(o), the norm over all heads at once

Our g_t is ``log f_t``, our k_t is ``1 - f_t``. The paper's letters: o_t is q, i_t is v, beta the floor. The floor, a
number for each channel, rises with depth, so that deeper layers forget more slowly: the softmax of Gamma ``[layers,
H K]`` over the layers, summed up to a layer, without the first; the first layer's floor is 0. Gamma belongs to the
model: the first HGRN2 layer holds it, and hands it to the others.

Source: Qin 2024, HGRN2: Gated Linear RNNs with State Expansion, arXiv 2404.07904, section 3; floors: Qin 2023, arXiv
2311.04823, section 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linstate.mixers.base import ALONE, Mixer, Place, head_count
from linstate.mixers.parts import GateFloor, RMSNorm, heads
from linstate.ops import linear_attention
from linstate.types import LayerState, state_dtype


class HGRN2(Mixer):
    """See the module. State: ``S [B, H, K, K]``. ``shared["hgrn2_floor"]`` hands Gamma from the first layer on."""

    recurrence = "linear_attention"
    equation = "S_t = diag(f) S_{t-1} + (1 - f) v^T, f per channel"
    source = "Qin 2024, arXiv 2404.07904"

    def __init__(
        self,
        d_model: int,
        num_heads: int | None = None,
        head_dim: int = 128,
        norm_eps: float = 1e-5,
        *,
        place: Place = ALONE,
    ) -> None:
        super().__init__(d_model)
        self.num_heads, self.head_dim = head_count(num_heads, d_model, head_dim), head_dim
        inner = self.num_heads * head_dim
        self.in_proj = nn.Linear(d_model, 3 * inner, bias=False)  # q, f, v
        self.floor = GateFloor(inner, place, "hgrn2_floor")
        self.norm = RMSNorm(inner, norm_eps)
        self.out_proj = nn.Linear(inner, d_model, bias=False)

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        shared: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, LayerState]:
        q, f, v = self.in_proj(x).chunk(3, dim=-1)  # [B, T, H * K] each
        g, k = self.floor(f.to(state_dtype(x)), shared)
        q, k, v, g = (heads(part, self.num_heads) for part in (F.silu(q), k.to(v.dtype), v, g))
        o, matrix = linear_attention(
            q, k, v, g, scale=1.0, initial_state=(state or {}).get("S"), cu_seqlens=cu_seqlens
        )
        return self.out_proj(self.norm(o.flatten(-2))), {"S": matrix}

    def init_state(self, batch: int, *, device: torch.device | str | None = None) -> LayerState:
        return {"S": self.zeros(batch, self.num_heads, self.head_dim, self.head_dim, device=device)}

    def recurrence_flops(self, tokens: int) -> int:
        return tokens * self.num_heads * self.head_dim**2 * 5
