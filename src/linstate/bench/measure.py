"""Fair timing: several calls measured in turn, so that whatever else the machine does falls on all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Run = Callable[[], Any]
Clock = Callable[[], float]

TURN = 0.01
"""Seconds that a turn should last: short calls are repeated within it."""
GEMM_SIZES = (1024, 512, 256, 128)


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, a number for each turn."""

    turns: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.turns)

    @property
    def fastest(self) -> float:
        return min(self.turns)


def seconds_of(run: Run, calls: int = 1, clock: Clock = time.perf_counter) -> float:
    """Seconds of one call, the mean of several."""
    with torch.no_grad():
        begin = clock()
        for _ in range(calls):
            run()
        return (clock() - begin) / calls


def in_turn(
    runs: Mapping[str, Run], *, rounds: int = 5, budget: float = 10.0, clock: Clock = time.perf_counter
) -> dict[str, Timing]:
    """Measure calls against each other: in each round every one has a turn, and the order is reversed each time.

    Before the first round each is called once or twice, which does not count. A call that is so slow that its turns would
    take longer than ``budget`` seconds has fewer turns, at least one, spread over the rounds.
    """
    repeats: dict[str, tuple[int, int]] = {}
    for who, run in runs.items():
        one = seconds_of(run, 1, clock)
        if one < 10 * TURN:  # the first call also loads and allocates
            one = seconds_of(run, 1, clock)
        calls = max(1, min(100, int(TURN / one))) if one > 0 else 100
        repeats[who] = calls, max(1, min(rounds, int(budget / max(one * calls, 1e-9))))
    times: dict[str, list[float]] = {who: [] for who in runs}
    order = list(runs)
    for number in range(rounds):
        for who in reversed(order) if number % 2 else order:
            calls, turns = repeats[who]
            if number * turns % rounds < turns:
                times[who].append(seconds_of(runs[who], calls, clock))
    return {who: Timing(tuple(seconds)) for who, seconds in times.items()}


@dataclass(frozen=True)
class Gemm:
    """``torch.mm`` of two square matrices: what the machine does at best in a precision."""

    size: int
    run: Run

    def rate(self, seconds: float) -> float:
        """GFLOP/s."""
        return 2 * self.size**3 / seconds / 1e9


def gemm(dtype: torch.dtype, *, longest: float = 0.15, clock: Clock = time.perf_counter) -> Gemm:
    """The largest of a few sizes that takes no longer than ``longest`` seconds (some processors have no bfloat16)."""
    found = None
    for size in reversed(GEMM_SIZES):
        a = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(dtype)
        tried = Gemm(size, lambda a=a: torch.mm(a, a))  # type: ignore[misc]
        seconds_of(tried.run)
        if found is not None and seconds_of(tried.run, clock=clock) > longest:
            break
        found = tried
    assert found is not None
    return found
