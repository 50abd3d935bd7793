"""What every layer of an encoder is: ``y = mixer(x, lengths)``, every token seeing every other."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from linstate.mixers.base import Configurable


class EncoderMixer(Configurable):
    """A layer that mixes the tokens of a whole text and has no state.

    Its options are the arguments of ``__init__`` behind ``d_model`` and ``max_length``.

    Class attributes:
        equation: in one line. source: the paper.
    """

    equation: ClassVar[str]
    source: ClassVar[str]
    kind: ClassVar[str] = "encoder"
    given: ClassVar[tuple[str, ...]] = ("d_model", "max_length")

    @abstractmethod
    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Mix ``x [B, T, D]``: y ``[B, T, D]``.

        Args:
            lengths: ``[B]`` how many tokens of a row count, the first ones; default all. What stands behind them has no
                effect on what is before, and what is returned there has no meaning.
        """

    @classmethod
    def build(cls, name: str, d_model: int, max_length: int, options: dict[str, Any]) -> EncoderMixer:
        """``cls(d_model, max_length, **options)``. Raises ConfigError for an option that does not exist."""
        cls.check_options(name, options)
        return cls(d_model, max_length, **options)  # type: ignore[call-arg]


def counted(x: Tensor, lengths: Tensor | None) -> Tensor:
    """``[B, T]``, or ``[1, T]`` of ones without lengths: whether a token counts."""
    place = torch.arange(x.shape[1], device=x.device)[None]
    return torch.ones_like(place, dtype=torch.bool) if lengths is None else place < lengths[:, None]
