"""Mixers side by side on one input, their outputs summed: the layer ``"mamba2+attention"`` of a pattern.

    y = sum_i c_i mixer_i(x)

The multipliers c (``scales``) are 1 unless given. The state has the tensors of each mixer under its name.

Source: Falcon-H1, Zuo 2025, arXiv 2507.22448, section 2; within one layer's heads: Hymba, Dong 2024, arXiv 2411.13676.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from linstate.errors import ConfigError
from linstate.mixers.base import ALONE, Mixer, Place
from linstate.types import LayerState, Range, prefixed, under

JOIN = "+"


class Parallel(Mixer):
    """See the module. State: ``<mixer>.<tensor>``. Its options are those of each mixer by its name, and ``scales``."""

    kinds: ClassVar[dict[str, type[Mixer]]]

    def __init__(
        self,
        d_model: int,
        scales: Sequence[float] | None = None,
        *,
        place: Place = ALONE,
        **options: Mapping[str, Any],
    ) -> None:
        super().__init__(d_model)
        self.scales = [1.0] * len(self.kinds) if scales is None else list(scales)
        if len(self.scales) != len(self.kinds):
            raise ConfigError(
                f"scales must be {len(self.kinds)} numbers, one for each of {', '.join(self.kinds)}, got {scales}"
            )
        self.parts = nn.ModuleDict(
            {
                name: kind.build(name, d_model, dict(options.get(name, {})), place.of(name))
                for name, kind in self.kinds.items()
            }
        )

    @classmethod
    def options(cls) -> dict[str, Any]:
        return {**{name: {} for name in cls.kinds}, "scales": None}

    @classmethod
    def add(cls, first: LayerState, later: LayerState) -> LayerState:
        total: LayerState = {}
        for name, kind in cls.kinds.items():
            total |= prefixed(name, kind.add(under(name, first), under(name, later)))
        return total

    def mixers(self) -> dict[str, Mixer]:
        """The mixers by name, as what they are."""
        return {name: part for name, part in self.parts.items() if isinstance(part, Mixer)}

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        shared: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, LayerState]:
        total, after = torch.zeros_like(x), LayerState()
        for scale, (name, mixer) in zip(self.scales, self.mixers().items(), strict=True):
            before = None if state is None else under(name, state)
            y, part = mixer(x, before, cu_seqlens=cu_seqlens, shared=shared)
            total, after = total + scale * y, after | prefixed(name, part)
        return total, after

    def init_state(self, batch: int, *, device: torch.device | str | None = None) -> LayerState:
        state: LayerState = {}
        for name, mixer in self.mixers().items():
            state |= prefixed(name, mixer.init_state(batch, device=device))
        return state

    def state_bytes(self, tokens: int) -> int:
        return sum(mixer.state_bytes(tokens) for mixer in self.mixers().values())

    def caches(self) -> dict[str, int | None]:
        return {
            f"{name}.{part}": places
            for name, mixer in self.mixers().items()
            for part, places in mixer.caches().items()
        }

    def ranges(self) -> dict[str, Range]:
        return {
            f"{name}.{part}": held
            for name, mixer in self.mixers().items()
            for part, held in mixer.ranges().items()
        }

    def recurrence_flops(self, tokens: int) -> int:
        return sum(mixer.recurrence_flops(tokens) for mixer in self.mixers().values())


def parallel(kinds: Mapping[str, type[Mixer]]) -> type[Mixer]:
    """The class of these mixers side by side: composition as the most careful of them, feed-forward as the first."""
    careful = ("refused", "approximate", "exact")
    found = list(kinds.values())
    members = {
        "kinds": dict(kinds),
        "recurrence": JOIN.join(kind.recurrence for kind in found),
        "equation": "y_t = " + " + ".join(f"{name}(x)_t" for name in kinds),
        "source": "; ".join(kind.source for kind in found),
        "joined": tuple(f"{name}.{part}" for name, kind in kinds.items() for part in kind.joined),
        "composition": min((kind.composition for kind in found), key=careful.index),
        "feed_forward": found[0].feed_forward,
    }
    return type("Parallel_" + "_".join(kinds), (Parallel,), members)
