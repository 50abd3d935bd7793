"""What stands between the projections of a mixer, for one token: the mixer itself, with projections that are there already.

So the measured call is the one that a model makes, Python and all, but for its matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from linstate import mixers
from linstate.bench.cases import Shape
from linstate.ops import native
from linstate.types import LayerState

SUFFIX = ", between its projections"


@dataclass(frozen=True)
class StepCase:
    """A mixer with a native step: ``model`` for people, ``options`` of its heads, ``largest`` size of them."""

    mixer: str
    model: str
    options: Callable[[Shape], dict[str, Any]]
    largest: int | None = None


def _heads(*sizes: str) -> Callable[[Shape], dict[str, Any]]:
    return lambda shape: {"num_heads": shape.heads, **dict.fromkeys(sizes, shape.size)}


STEPS: dict[str, StepCase] = {
    case.mixer + SUFFIX: case
    for case in (
        StepCase("deltanet", "DeltaNet", _heads("head_dim")),
        StepCase("gated_deltanet", "Gated DeltaNet", _heads("head_dim")),
        StepCase("kimi_delta", "KDA", _heads("head_dim")),
        StepCase("linear_transformer", "Linear Transformer", _heads("head_dim")),
        StepCase("retnet", "RetNet", _heads("head_dim", "v_head_dim")),
        StepCase("mamba2", "Mamba-2", _heads("head_dim", "state_size")),
        StepCase("gla", "GLA", _heads("head_dim", "v_head_dim")),
        StepCase("rwkv5", "RWKV-5", _heads("head_dim"), 64),
        StepCase("rwkv6", "RWKV-6", _heads("head_dim"), 64),
        StepCase("rwkv7", "RWKV-7", _heads("head_dim"), 64),
    )
}
"""By the name in the table."""


class _Given(nn.Module):
    """In place of a projection: always the same result."""

    def __init__(self, linear: nn.Linear, batch: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(0))  # tells where the mixer is, and in what precision
        self.made = torch.randn(batch, 1, linear.out_features, generator=torch.Generator().manual_seed(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.made


def at(name: str, shape: Shape) -> Shape:
    """The shape in which a mixer is measured."""
    largest = STEPS[name].largest
    return shape if largest is None else replace(shape, size=min(shape.size, largest))


@torch.no_grad()
def build(name: str, shape: Shape) -> mixers.Mixer:
    """The mixer, its projections replaced, for a batch of ``shape.batch``."""
    case = STEPS[name]
    made = mixers.find(case.mixer).build(case.mixer, shape.heads * shape.size, case.options(shape))
    for module in list(made.modules()):
        for child, linear in list(module.named_children()):
            if isinstance(linear, nn.Linear):
                setattr(module, child, _Given(linear, shape.batch))
    return made.eval().requires_grad_(False)


def within(buffer: Tensor, like: LayerState) -> LayerState:
    """Zeros as ``like``, one behind the other in ``buffer`` (float32; positions stay beside it)."""
    state, begin = LayerState(), 0
    for name, t in like.items():
        if t.dtype is torch.float32:
            state[name] = buffer[begin : begin + t.numel()].view(t.shape)
            begin += t.numel()
        else:
            state[name] = t.clone()
    return state


def step(mixer: mixers.Mixer, shape: Shape, ring: list[LayerState], isa: str | None) -> Callable[[], Any]:
    """One token from the next state of the ring; ``isa`` None: by torch."""
    x = torch.randn(shape.batch, 1, mixer.d_model, generator=torch.Generator().manual_seed(1))
    number = count()

    def run() -> Any:
        state = ring[next(number) % len(ring)]
        if isa == native.isa():
            return mixer(x, state)
        with _without_native() if isa is None else native.using(isa):
            return mixer(x, state)

    return run


@contextmanager
def _without_native() -> Iterator[None]:
    before, native.reason = native.reason, "the torch form is measured"
    try:
        yield
    finally:
        native.reason = before
