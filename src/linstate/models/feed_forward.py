"""Feed-forward layers: ``y, state = ff(x, state)``; most have no state."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linstate.errors import ConfigError
from linstate.mixers.base import ALONE, Place
from linstate.mixers.parts import token_shift
from linstate.types import LayerState, state_dtype


class FeedForward(nn.Module, ABC):
    """Base: a feed-forward without a state. ``place`` is where in the model it stands; most do not look at it."""

    def __init__(self, d_model: int, d_ff: int | None = None, place: Place = ALONE) -> None:
        super().__init__()
        self.d_model, self.d_ff = d_model, d_ff or self.default_width(d_model)

    @staticmethod
    def default_width(d_model: int) -> int:
        return 4 * d_model

    def init_state(self, batch: int, *, device: torch.device | str | None = None) -> LayerState:
        """The empty state, ``batch`` rows."""
        return {}

    @abstractmethod
    def forward(
        self, x: Tensor, state: LayerState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, LayerState]:
        """``x [B, T, D] -> y [B, T, D]`` and the state after."""


class SwiGLU(FeedForward):
    """``W_down (silu(W_gate x) * W_up x)`` (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, d_model: int, d_ff: int | None = None, place: Place = ALONE) -> None:
        super().__init__(d_model, d_ff, place)
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


class SGLU(FeedForward):
    """``W_down (W_gate x * W_up x)``, a gate without an activation (TransNormerLLM, Qin 2023, arXiv 2307.14995)."""

    def __init__(self, d_model: int, d_ff: int | None = None, place: Place = ALONE) -> None:
        super().__init__(d_model, d_ff, place)
        self.up = nn.Linear(d_model, 2 * self.d_ff, bias=False)  # gate and up in one product
        self.down = nn.Linear(self.d_ff, d_model, bias=False)

    @staticmethod
    def default_width(d_model: int) -> int:
        return SwiGLU.default_width(d_model)

    def forward(
        self, x: Tensor, state: LayerState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, LayerState]:
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(gate * up), {}


class ChannelMix(FeedForward):
    """Base of RWKV's channel mixes: ``mix`` are the rates at which the token before mixes in. State: ``shift [B, 1, D]``."""

    depth_power = 1
    """How fast the initial rates change with depth."""
    rates = 1

    def __init__(self, d_model: int, d_ff: int | None = None, place: Place = ALONE) -> None:
        super().__init__(d_model, d_ff, place)
        rest = 1 - place.layer / place.layers  # 1 to almost 0 with depth
        mix = 1 - (torch.arange(d_model) / d_model) ** rest**self.depth_power
        self.mix = nn.Parameter(mix if self.rates == 1 else mix.repeat(self.rates, 1))
        self.up = nn.Linear(d_model, self.d_ff, bias=False)
        self.down = nn.Linear(self.d_ff, d_model, bias=False)

    def init_state(self, batch: int, *, device: torch.device | str | None = None) -> LayerState:
        weight = self.up.weight
        return {
            "shift": torch.zeros(
                batch, 1, self.d_model, device=device or weight.device, dtype=state_dtype(weight)
            )
        }


class RWKVChannelMix(ChannelMix):
    """``sigmoid(W_r x_r) * W_down relu(W_up x_k)^2``, x_r and x_k each a ``lerp(x_t, x_{t-1}, mu)``: RWKV-4 to RWKV-6.

    Source: Peng 2023, arXiv 2305.13048; Peng 2024, arXiv 2404.05892. State: ``shift [B, 1, D]``.
    """

    rates = 2

    def __init__(self, d_model: int, d_ff: int | None = None, place: Place = ALONE) -> None:
        super().__init__(d_model, d_ff, place)
        self.receptance = nn.Linear(d_model, d_model, bias=False)

    @staticmethod
    def default_width(d_model: int) -> int:
        return max(32, 7 * d_model // 2 // 32 * 32)  # of RWKV-5 and RWKV-6

    def forward(
        self, x: Tensor, state: LayerState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, LayerState]:
        before, last = token_shift(x, (state or {}).get("shift"), cu_seqlens)
        k, r = (torch.lerp(x, before, mix) for mix in self.mix)
        y = self.down(F.relu(self.up(k)).square())  # [B, T, D]
        return self.receptance(r).sigmoid() * y, {"shift": last}


class RWKV4ChannelMix(RWKVChannelMix):
    """RWKV-4's is as wide as the plain feed-forward (Peng 2023, arXiv 2305.13048, section 3.1)."""

    @staticmethod
    def default_width(d_model: int) -> int:
        return FeedForward.default_width(d_model)


class RWKV7ChannelMix(ChannelMix):
    """``W_down relu(W_up lerp(x_t, x_{t-1}, mu))^2`` (RWKV-7, Peng 2025, arXiv 2503.14456). State: ``shift [B, 1, D]``."""

    depth_power = 4

    def forward(
        self, x: Tensor, state: LayerState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, LayerState]:
        before, last = token_shift(x, (state or {}).get("shift"), cu_seqlens)
        return self.down(F.relu(self.up(torch.lerp(x, before, self.mix))).square()), {"shift": last}


KINDS: dict[str, type[FeedForward]] = {
    "swiglu": SwiGLU,
    "sglu": SGLU,
    "rwkv_channel_mix": RWKVChannelMix,
    "rwkv4_channel_mix": RWKV4ChannelMix,
    "rwkv7_channel_mix": RWKV7ChannelMix,
}


def build(name: str, d_model: int, d_ff: int | None, place: Place = ALONE) -> FeedForward:
    """The feed-forward of this name. Raises ConfigError."""
    if name not in KINDS:
        raise ConfigError(f"there is no feed-forward {name!r}; there are: {', '.join(KINDS)}")
    return KINDS[name](d_model, d_ff, place)
