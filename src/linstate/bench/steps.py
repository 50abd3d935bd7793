"""One token: every recurrence's step from a state to a state, beside copying that state, in the same rounds.

In a model the state of a layer is not in the cache when its turn comes: the layers between have used it. So a step
here takes the next of many states, together larger than caches are, and so does the copy, which reads a state and
writes another: what no step can do without.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

from linstate.bench.cases import CASES, Case, Inputs, Shape
from linstate.bench.measure import Clock, Run, in_turn, seconds_of
from linstate.errors import BackendError

BATCHES = (1, 8, 64)
RING_BYTES = 128 * 2**20
"""States together: more than the last cache of most machines."""


@dataclass(frozen=True)
class Step:
    """One implementation's microseconds for one token of each of ``batch`` texts; ``times_copy``: over those of the copy."""

    case: str
    model: str
    who: str
    batch: int
    heads: int
    size: int
    dtype: str
    state_bytes: int
    us: float
    copy_us: float
    times_copy: float


def steps(
    *,
    only: str = "",
    heads: int = 16,
    size: int = 128,
    rounds: int = 5,
    isas: tuple[str, ...] = (),
    clock: Clock = time.perf_counter,
) -> Iterator[list[Step]]:
    """Rows of one case and batch after another, in float32; what a backend has no step for is left out."""
    for case in [case for name, case in CASES.items() if only in name]:
        for batch in BATCHES:
            yield _measure(case, case.at(Shape(1, heads, size, batch=batch)), rounds, isas, clock)


def _measure(case: Case, shape: Shape, rounds: int, isas: tuple[str, ...], clock: Clock) -> list[Step]:
    inputs = case.inputs(shape)
    with torch.no_grad():
        _, state = case.call(inputs, form="step", backend="torch")
    one = state.numel() * state.element_size()
    ring = [state.clone() for _ in range(max(2, -(-RING_BYTES // one)))]
    runs: dict[str, Run] = {}
    for isa in isas:
        runs[f"native {isa}"] = _step(case, inputs, ring, isa)
    runs["torch"] = _step(case, inputs, ring, None)
    for who in list(runs):
        try:
            seconds_of(runs[who])
        except BackendError:
            del runs[who]
    timings = in_turn({**runs, "": _copy(ring)}, rounds=rounds, clock=clock)
    copied = timings.pop("").median
    return [
        Step(
            case.name,
            case.model,
            who,
            shape.batch,
            shape.heads,
            shape.size,
            shape.precision,
            one,
            timing.median * 1e6,
            copied * 1e6,
            timing.median / copied,
        )
        for who, timing in timings.items()
    ]


def _step(case: Case, inputs: Inputs, ring: list[Tensor], isa: str | None) -> Run:
    number = count()

    def run() -> Any:
        before = ring[next(number) % len(ring)]
        if isa is None:
            return case.call(inputs, form="step", backend="torch", initial_state=before)
        return case.native(inputs, isa, form="step", initial_state=before)

    return run


def _copy(ring: list[Tensor]) -> Run:
    number, away = count(), len(ring) // 2

    def run() -> Any:
        place = next(number)
        return ring[(place + away) % len(ring)].copy_(ring[place % len(ring)])

    return run
