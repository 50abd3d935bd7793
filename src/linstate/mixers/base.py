"""What every mixer is: ``y, state = mixer(x, state)``, the same call for training, prefill and decoding."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from linstate.errors import ConfigError
from linstate.types import LayerState, state_bytes


class Mixer(nn.Module, ABC):
    """A layer that mixes tokens along time and carries a state.

    A concrete mixer is the one class of its file in ``mixers/``; the file's name is its name. Its options are
    the keyword arguments of ``__init__`` behind ``d_model``.

    Class attributes:
        recurrence: the room in ``ops/`` that it rests on.
        equation: the recurrence in one line, in the symbols of :mod:`linstate.types`.
        source: the paper.
        feed_forward: the feed-forward that its paper pairs it with (``models/feed_forward.py``).
    """

    recurrence: ClassVar[str]
    equation: ClassVar[str]
    source: ClassVar[str]
    feed_forward: ClassVar[str] = "swiglu"

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model

    @abstractmethod
    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        shared: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, LayerState]:
        """Mix ``x [B, T, D]`` from ``state`` (default: :meth:`init_state`) and return y ``[B, T, D]`` and the state after.

        Args:
            cu_seqlens: ``[N + 1]`` boundaries of N sequences packed along T; then B = 1 and states are ``[N, ...]``.
            shared: what layers of one forward pass hand to each other (RWKV-7: the values of the first layer).
        """

    @abstractmethod
    def init_state(self, batch: int, *, device: torch.device | str | None = None) -> LayerState:
        """The empty state: named tensors with ``batch`` rows, on ``device`` (default: that of the weights)."""

    @abstractmethod
    def recurrence_flops(self, tokens: int) -> int:
        """FLOPs of everything but the projections, when ``tokens`` tokens are decoded one by one from an empty state."""

    def flops(self, tokens: int) -> int:
        """FLOPs (a multiply-add is two) to decode ``tokens`` tokens, projections included."""
        weights = sum(p.numel() for p in self.parameters() if p.dim() > 1)
        return 2 * weights * tokens + self.recurrence_flops(tokens)

    def state_bytes(self, tokens: int) -> int:
        """Bytes of one row's state after ``tokens`` tokens; a recurrent mixer does not look at ``tokens``."""
        return state_bytes(self.init_state(1, device="meta"))

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @classmethod
    def options(cls) -> dict[str, Any]:
        """The options of this mixer and their defaults."""
        parameters = list(inspect.signature(cls).parameters.values())[1:]
        return {p.name: p.default for p in parameters}

    @classmethod
    def build(cls, name: str, d_model: int, options: dict[str, Any]) -> Mixer:
        """``cls(d_model, **options)``, with an error that names an option that does not exist. Raises ConfigError."""
        known = cls.options()
        for option in options:
            if option not in known:
                raise ConfigError(f"mixer {name!r} has no option {option!r}; it has: {', '.join(known) or 'none'}")
        return cls(d_model, **options)


def divide(whole: int, parts: int, what: str) -> int:
    """``whole // parts``, or a ConfigError that says what does not divide."""
    if parts < 1 or whole % parts:
        raise ConfigError(f"{what}: {whole} cannot be divided into {parts} equal parts")
    return whole // parts
