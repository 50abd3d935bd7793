"""What each mixer is good and bad at: sentences made of measured numbers, none without one."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from linstate.bench.compare import capacity, cost, sizes, tables
from linstate.bench.compare.jobs import Run
from linstate.bench.compare.tasks import TASKS

MEASURED = Path(__file__).parent / "measured.json"
"""The run that docs/compare.md shows; it comes with the package."""

GOOD, BAD = 0.9, 0.6
"""Accuracies from which a task is a strength, and below which a weakness."""

FASTER = 1.25
"""How many times as fast as softmax attention, or as slow, a mixer must be to have it said."""


class Finding(NamedTuple):
    """A sentence with its number. ``good``: whether it speaks for the mixer; None where it does neither."""

    good: bool | None
    text: str


@cache
def measured() -> Run | None:
    """The run that comes with the package, if there is one."""
    return Run.load(MEASURED) if MEASURED.is_file() else None


def findings(run: Run, mixer: str) -> list[Finding]:
    """All that a run says of a mixer."""
    return [*_state(run, mixer), *_speed(run, mixer), *_capacity(run, mixer), *_tasks(run, mixer)]


def _state(run: Run, mixer: str) -> Iterator[Finding]:
    costs = tables.part(run, "cost")
    if mixer in costs:
        short, long = str(cost.LENGTHS[0]), str(cost.LENGTHS[-1])
        mine, base = (costs[name]["state_bytes"] for name in (mixer, sizes.BASE))
        if mine[long] > 1.01 * mine[short] and mine[long] > 100 * mine[short]:
            yield Finding(False, f"state grows to {tables.number(mine[long])}B at {int(long):,} tokens")
        else:
            share = f", softmax attention's is {tables.number(base[long])}B"
            yield Finding(True, f"state of {tables.number(mine[long])}B at {int(long):,} tokens{share}")


def _speed(run: Run, mixer: str) -> Iterator[Finding]:
    speeds = tables.speeds(run)
    for what in ("prefill", "decode") if mixer in speeds and mixer != sizes.BASE else ():
        for length, found in speeds[mixer][what].items():
            times = found["times_attention"]
            if not 1 / FASTER < times < FASTER:
                yield Finding(
                    times > 1, f"{what} at {int(length):,} tokens {times:.2f}x softmax attention's speed"
                )


def _capacity(run: Run, mixer: str) -> Iterator[Finding]:
    for case, held_by in tables.BARE.items():
        found = tables.part(run, "capacity").get(f"{case}/random")
        if found and mixer in held_by:
            pairs, size = capacity.recalls(found), capacity.CASES[case].size
            keys = f"random keys of {size} channels, no gates"
            if pairs == capacity.PAIRS[-1]:
                yield Finding(True, f"bare {case} recalls all of {pairs:,} pairs ({keys})")
            else:
                yield Finding(None, f"bare {case} recalls 99% of up to {pairs} pairs ({keys})")


def _tasks(run: Run, mixer: str) -> Iterator[Finding]:
    for task, about in TASKS.items():
        for name, found in tables.best(run, task).items():
            if name.split()[0] == mixer:
                right = found["accuracy"][about.judged]
                good = True if right >= GOOD else False if right < BAD else None
                variant = name.removeprefix(mixer).strip()
                of = f"{task} with eigenvalues in {variant}" if variant else task
                learned = "" if right >= BAD else " not learned"
                yield Finding(
                    good, f"{of}{learned} in {found['steps']} steps: {right:.0%} right ({about.judged})"
                )
