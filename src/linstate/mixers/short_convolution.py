"""Gated short convolution: a convolution over the last W tokens between two gates; its state is the last W - 1 inputs.

    b, c, u = W x      o_t = c_t * conv(b * u)_t      y = W_o o

Source: Liquid AI 2025, LFM2 Technical Report, arXiv 2511.23404, section 2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linstate.mixers.base import Mixer
from linstate.mixers.parts import ShortConvolution
from linstate.types import LayerState


class GatedShortConvolution(Mixer):
    """See the module. State: ``conv [B, W - 1, D]``."""

    recurrence = "causal_conv1d"
    equation = "o_t = c_t * sum_{i < W} w_i * b_{t-i} * u_{t-i}"
    source = "LFM2 2025, arXiv 2511.23404"
    composition = "refused"  # nothing of it adds up

    def __init__(self, d_model: int, width: int = 3, bias: bool = False) -> None:
        super().__init__(d_model)
        self.in_proj = nn.Linear(d_model, 3 * d_model, bias=bias)  # b, c, u
        self.conv = ShortConvolution(d_model, width, bias=bias, activation=None)
        self.out_proj = nn.Linear(d_model, d_model, bias=bias)

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        shared: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, LayerState]:
        b, c, u = self.in_proj(x).chunk(3, dim=-1)  # [B, T, D] each
        o, tail = self.conv(b * u, state["conv"] if state else None, cu_seqlens)
        return self.out_proj(c * o), {"conv": tail}

    def init_state(self, batch: int, *, device: torch.device | str | None = None) -> LayerState:
        return {"conv": self.conv.init_state(batch, device or self.device)}

    def recurrence_flops(self, tokens: int) -> int:
        return tokens * self.d_model * (2 * self.conv.width + 2)
