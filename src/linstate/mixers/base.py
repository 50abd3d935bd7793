"""What every mixer is: ``y, state = mixer(x, state)``, the same call for training, prefill and decoding."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from linstate.errors import ConfigError
from linstate.types import LayerState, Range, state_bytes, state_dtype


class Place(NamedTuple):
    """Where in a model a layer stands: ``layer`` (from 0) of ``layers``, and whether it is the ``first`` of its kind.

    ``before`` are the mixers of the layers before it.
    """

    layer: int = 0
    layers: int = 1
    first: bool = True
    before: frozenset[str] = frozenset()

    def of(self, name: str) -> Place:
        """The place of the mixer ``name`` here."""
        return self._replace(first=name not in self.before)


ALONE = Place()
"""The place of a layer that is not part of a model."""


class Configurable(nn.Module, ABC):
    """A layer with options: the arguments of its ``__init__`` behind those that the model gives (``given``)."""

    kind: ClassVar[str]
    """What errors call it."""
    given: ClassVar[tuple[str, ...]] = ("d_model",)

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model

    @classmethod
    def options(cls) -> dict[str, Any]:
        """The options of this layer and their defaults."""
        parameters = inspect.signature(cls).parameters.values()
        return {
            p.name: p.default for p in parameters if p.kind is not p.KEYWORD_ONLY and p.name not in cls.given
        }

    @classmethod
    def check_options(cls, name: str, options: dict[str, Any]) -> None:
        """Raises a ConfigError that names an option that does not exist, and those that do."""
        known = cls.options()
        for option in options:
            if option not in known:
                raise ConfigError(
                    f"{cls.kind} {name!r} has no option {option!r}; it has: {', '.join(known) or 'none'}"
                )


class Mixer(Configurable):
    """A layer that mixes tokens along time and carries a state.

    A concrete mixer is the one class of its file in ``mixers/``; the file's name is its name. Its options are
    the arguments of ``__init__`` behind ``d_model``. A keyword-only argument ``place`` is no option: a mixer
    whose weights depend on where it stands names it, and the model passes it.

    Class attributes:
        recurrence: the room in ``ops/`` that it rests on.
        equation: the recurrence in one line, in the symbols of :mod:`linstate.types`.
        source: the paper.
        composition: what the sum of two states is for this mixer: "exact", "approximate" or "refused"
            (:mod:`linstate.state.compose`). summed: the tensors of its state that add up. joined: those that are put one
            behind the other.
        feed_forward: the feed-forward that its paper pairs it with (``models/feed_forward.py``).
    """

    recurrence: ClassVar[str]
    equation: ClassVar[str]
    source: ClassVar[str]
    composition: ClassVar[Literal["exact", "approximate", "refused"]] = "approximate"
    summed: ClassVar[tuple[str, ...]] = ("S",)
    joined: ClassVar[tuple[str, ...]] = ()
    feed_forward: ClassVar[str] = "swiglu"
    kind: ClassVar[str] = "mixer"

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

    def caches(self) -> dict[str, int | None]:
        """The tensors of its state that are keys and values of ``softmax_attention``, in its layout and beside their ``length``: how
        many places each has; None: one for each token."""
        return {}

    def ranges(self) -> dict[str, Range]:
        """The whole numbers of its state: smallest and largest value, or the tensor whose places (axis 1) are the largest.

        A state that comes from outside is held against them before anything is computed
        (:class:`linstate.models.state_table.StateTable`); every integer tensor of :meth:`init_state` has one.
        """
        return {}

    def zeros(self, *shape: int, device: torch.device | str | None = None) -> Tensor:
        """Zeros for a state: float32 (float64 for float64 weights), on ``device`` or where the weights are."""
        return torch.zeros(shape, device=device or self.device, dtype=state_dtype(next(self.parameters())))

    @classmethod
    def add(cls, first: LayerState, later: LayerState) -> LayerState:
        """The sum of two states (``composition``): the matrices add up, short memories are those of ``later``."""
        return {name: first[name] + t if name in cls.summed else t for name, t in later.items()}

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @classmethod
    def build(cls, name: str, d_model: int, options: dict[str, Any], place: Place = ALONE) -> Mixer:
        """``cls(d_model, **options)``, with an error that names an option that does not exist. Raises ConfigError."""
        cls.check_options(name, options)
        if "place" in inspect.signature(cls).parameters:
            return cls(d_model, **options, place=place)  # type: ignore[call-arg]
        return cls(d_model, **options)


def divide(whole: int, parts: int, what: str) -> int:
    """``whole // parts``, or a ConfigError that says what does not divide."""
    if parts < 1 or whole % parts:
        raise ConfigError(f"{what}: {whole} cannot be divided into {parts} equal parts")
    return whole // parts


def head_count(num_heads: int | None, d_model: int, head_dim: int) -> int:
    """``num_heads``, by default as many heads of ``head_dim`` as fit into ``d_model``, at least one."""
    return max(1, d_model // head_dim) if num_heads is None else num_heads
