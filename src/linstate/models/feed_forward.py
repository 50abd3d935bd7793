"""Feed-forward layers: ``y, state = ff(x, state)``; most have no state."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linstate.errors import ConfigError
from linstate.types import LayerState


class FeedForward(nn.Module):
    """Base: a feed-forward without a state."""

    def __init__(self, d_model: int, d_ff: int | None = None) -> None:
        super().__init__()
        self.d_model, self.d_ff = d_model, d_ff or self.default_width(d_model)

    @staticmethod
    def default_width(d_model: int) -> int:
        return 4 * d_model

    def init_state(self, batch: int, *, device: torch.device | str | None = None) -> LayerState:
        """The empty state, ``batch`` rows."""
        return {}

    def forward(
        self, x: Tensor, state: LayerState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, LayerState]:
        """``x [B, T, D] -> y [B, T, D]`` and the state after."""
        raise NotImplementedError


class SwiGLU(FeedForward):
    """``W_down (silu(W_gate x) * W_up x)`` (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, d_model: int, d_ff: int | None = None) -> None:
        super().__init__(d_model, d_ff)
        self.up = nn.Linear(d_model, 2 * self.d_ff, bias=False)  # gate and up in one product
        self.down = nn.Linear(self.d_ff, d_model, bias=False)

    @staticmethod
    def default_width(d_model: int) -> int:
        return -(-8 * d_model // 3 // 32) * 32

    def forward(
        self, x: Tensor, state: LayerState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, LayerState]:
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up), {}


KINDS: dict[str, type[FeedForward]] = {"swiglu": SwiGLU}


def build(name: str, d_model: int, d_ff: int | None) -> FeedForward:
    """The feed-forward of this name. Raises ConfigError."""
    if name not in KINDS:
        raise ConfigError(f"there is no feed-forward {name!r}; there are: {', '.join(KINDS)}")
    return KINDS[name](d_model, d_ff)
