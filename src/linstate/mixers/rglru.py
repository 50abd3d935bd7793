"""RG-LRU, the recurrent block of Griffin and Hawk: a scan whose decay is gated, and whose input keeps its size.

    S_t = a_t * S_{t-1} + sqrt(1 - a_t^2) * (i_t * x_t)      log a_t = -8 r_t softplus(Lambda)      o_t = S_t
    r_t = sigmoid(W_r x_t + b_r)      i_t = sigmoid(W_i x_t + b_i)      x = conv(W_x u + b_x)
    y = W_o (o * gelu(W_z u + b_z)) + b_o

The paper's letters: u is the layer's input, h_t is S_t, c is 8, a is sigmoid(Lambda), so ``-softplus(Lambda)`` stands
for log a with Lambda's sign turned. W_r and W_i are block-diagonal, a block for each head. A text's first token has
nothing to make room for: its factor is 1 in place of ``sqrt(1 - a^2)``, as in the authors' code.

Source: De 2024, Griffin, arXiv 2402.19427, sections 2.3 and 2.4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linstate.mixers.base import Mixer, divide, head_count
from linstate.mixers.parts import ShortConvolution, heads, positions
from linstate.ops import selective_scan
from linstate.types import MOST_TOKENS, LayerState, Range, state_dtype


class RGLRU(Mixer):
    """See the module. State: ``S [B, 1, 1, E]`` for E channels, ``conv [B, W - 1, E]``, ``position [B]`` int64."""

    recurrence = "selective_scan"
    equation = "S_t = a * S_{t-1} + sqrt(1 - a^2) * (i * x), a and i gated"
    source = "De 2024, arXiv 2402.19427"

    def __init__(
        self, d_model: int, width: int | None = None, num_heads: int | None = None, conv_width: int = 4
    ) -> None:
        super().__init__(d_model)
        self.width = d_model if width is None else width
        self.num_heads = head_count(num_heads, self.width, 64)
        block = divide(self.width, self.num_heads, "width into num_heads blocks")
        self.in_proj = nn.Linear(d_model, 2 * self.width)  # x, z
        self.conv = ShortConvolution(self.width, conv_width, bias=True, activation=None)
        self.gate_weight = nn.Parameter(torch.randn(2, self.num_heads, block, block) * block**-0.5)  # i, r
        self.gate_bias = nn.Parameter(torch.zeros(2, self.num_heads, block))
        fastest = torch.empty(self.width).uniform_(0.9, 0.999)  # a_t where r_t = 1
        self.decay = nn.Parameter((-fastest.log() / 8).expm1().log())
        self.out_proj = nn.Linear(self.width, d_model)

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        shared: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, LayerState]:
        state = state or {}
        # torch adds a bias to the product of a view in another order: other bits
        inner, z = self.in_proj(x.contiguous()).chunk(2, dim=-1)
        inner, tail = self.conv(inner, state.get("conv"), cu_seqlens)
        position, after = positions(state.get("position"), x, cu_seqlens)
        wide = state_dtype(x)
        blocks = heads(inner, self.num_heads)  # [B, T, H, D]
        logits = torch.einsum("bthd,ghde->gbthe", blocks, self.gate_weight) + self.gate_bias[:, None, None]
        i, r = logits.to(wide).sigmoid().flatten(-2)  # [B, T, E] each
        g = -8 * r * F.softplus(self.decay.to(wide))  # log a
        # a slope of 1/0 where nothing is forgotten is not wanted
        room = (-torch.expm1(2 * g)).clamp(min=1e-12).sqrt()
        room = torch.where((position == 0)[..., None], torch.ones_like(room), room)
        v = (inner * i * room).to(x.dtype)
        o, matrix = selective_scan(
            None, None, v[:, :, None], g[:, :, None], initial_state=state.get("S"), cu_seqlens=cu_seqlens
        )
        y = self.out_proj(o[:, :, 0] * F.gelu(z, approximate="tanh"))
        return y, {"S": matrix, "conv": tail, "position": after}

    def init_state(self, batch: int, *, device: torch.device | str | None = None) -> LayerState:
        matrix = self.zeros(batch, 1, 1, self.width, device=device)
        return {
            "S": matrix,
            "conv": self.conv.init_state(batch, device or self.device),
            "position": torch.zeros(batch, dtype=torch.int64, device=matrix.device),
        }

    def ranges(self) -> dict[str, Range]:
        return {"position": (0, MOST_TOKENS)}

    def recurrence_flops(self, tokens: int) -> int:
        return tokens * self.width * 10
