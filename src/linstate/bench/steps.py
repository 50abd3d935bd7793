"""One token: every recurrence's step from a state to a state, beside copying that state, in the same rounds; and every
mixer's that has a native step, all that stands between its projections.

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

from linstate.bench import mixers
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


def names(only: str = "") -> list[str]:
    """Cases, and the mixers behind them, that have ``only`` in their names."""
    return [name for name in (*CASES, *mixers.STEPS) if only in name]


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
    for name in names(only):
        for batch in BATCHES:
            shape = Shape(1, heads, size, batch=batch)
            found = _of_case(CASES[name], shape, isas) if name in CASES else _of_mixer(name, shape, isas)
            yield _measure(*found, rounds, clock)


Found = tuple[str, str, Shape, int, dict[str, Run], Run]
"""Name, model, shape, bytes of a state, the runs, and the copy."""


def _of_case(case: Case, shape: Shape, isas: tuple[str, ...]) -> Found:
    shape = case.at(shape)
    inputs = case.inputs(shape)
    with torch.no_grad():
        _, state = case.call(inputs, form="step", backend="torch")
    one = state.numel() * state.element_size()
    ring = [state.clone() for _ in range(_count(one))]
    runs = {f"native {isa}": _step(case, inputs, ring, isa) for isa in isas}
    runs["torch"] = _step(case, inputs, ring, None)
    return case.name, case.model, shape, one, runs, _copy(ring)


def _of_mixer(name: str, shape: Shape, isas: tuple[str, ...]) -> Found:
    shape = mixers.at(name, shape)
    mixer = mixers.build(name, shape)
    state = mixer.init_state(shape.batch)
    one = sum(t.numel() * t.element_size() for t in state.values())
    # The states as one stretch of memory each, so that the copy is one.
    whole = [torch.zeros(one // 4) for _ in range(_count(one))]
    ring = [mixers.within(buffer, state) for buffer in whole]
    runs = {f"native {isa}": mixers.step(mixer, shape, ring, isa) for isa in isas}
    runs["torch"] = mixers.step(mixer, shape, ring, None)
    return name, mixers.STEPS[name].model, shape, one, runs, _copy(whole)


def _count(size: int) -> int:
    return max(2, -(-RING_BYTES // size))


def _measure(
    name: str, model: str, shape: Shape, size: int, runs: dict[str, Run], copy: Run, rounds: int, clock: Clock
) -> list[Step]:
    for who in list(runs):
        try:
            seconds_of(runs[who])
        except BackendError:
            del runs[who]
    timings = in_turn({**runs, "": copy}, rounds=rounds, clock=clock)
    copied = timings.pop("").median
    return [
        Step(
            name,
            model,
            who,
            shape.batch,
            shape.heads,
            shape.size,
            shape.precision,
            size,
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
