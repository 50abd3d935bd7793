"""Speed of the recurrences on this machine: native, our torch form, other people's functions and softmax attention, in turn.

A cell is one case at one length in one precision. Everything in it is measured in the same rounds, with a matmul of the
same precision, so that ratios and shares hold on a machine that is not quiet.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linstate.bench import memory
from linstate.bench.cases import CASES, Case, Inputs, Shape
from linstate.bench.machine import free_bytes, machine
from linstate.bench.measure import Clock, Gemm, Timing, gemm, in_turn, seconds_of
from linstate.bench.peers import PEERS, Run, missing
from linstate.bench.steps import Step, names
from linstate.errors import ArgumentError, BackendError
from linstate.ops import native

PROBE = 64
"""Tokens of the call that shows whether an implementation works at all: the least that every one takes."""
_BASE = 512
"""Tokens from which a time is extrapolated when the first length is longer."""
SWEEP = (64, 256, 1024, 4096, 16384, 65536)
DTYPES = (torch.float32, torch.bfloat16)
OURS = ("native", "torch")


@dataclass(frozen=True)
class Implementation:
    """Somebody's way to compute a case. ``kind``: native, torch, transformers, FLA naive or softmax."""

    who: str
    kind: str
    function: str
    bind: Callable[[Inputs, Shape], Run]
    output: Callable[[Any], Tensor] = lambda result: result[0]
    multiple: int = 1
    floats: Callable[[int], int] = lambda size: 16 * size
    power: int = 1
    """With which power of T its time grows."""


def implementations(case: Case, isas: Sequence[str] = (), *, who: str = "") -> list[Implementation]:
    """Everything that may be measured for a case, ours first; whether it works is seen when it is called.

    Args:
        isas: the instruction sets to measure native kernels with.
        who: only what has this name (finding somebody else's function can take seconds).
    """
    found = []
    for isa in isas:
        found.append(Implementation(f"native {isa}", "native", case.recurrence, _native(case, isa)))
    found.append(Implementation("torch", "torch", case.recurrence, _torch(case)))
    for peer in PEERS.get(case.name, ()):
        function = peer.find() if who in ("", peer.who) else None
        if function is not None:
            bind = _peer(peer.bind, function)
            found.append(
                Implementation(
                    peer.who, peer.who, peer.function, bind, peer.output, peer.multiple, peer.floats
                )
            )
    if case.beside_softmax:
        found += [_softmax(dtype) for dtype in DTYPES]
    return [one for one in found if who in ("", one.who)]


def _native(case: Case, isa: str) -> Callable[[Inputs, Shape], Run]:
    return lambda inputs, shape: lambda: case.native(inputs, isa, form="chunked")


def _torch(case: Case) -> Callable[[Inputs, Shape], Run]:
    return lambda inputs, shape: lambda: case.call(inputs, form="chunked", backend="torch")


def _peer(bind: Callable[[Any, Inputs], Run], function: Any) -> Callable[[Inputs, Shape], Run]:
    return lambda inputs, shape: bind(function, inputs)


def _softmax(dtype: torch.dtype) -> Implementation:
    """Softmax attention with as many heads of the same size, causal, laid out as it likes best."""

    def bind(inputs: Inputs, shape: Shape) -> Run:
        random = torch.Generator().manual_seed(0)
        size = (shape.batch, shape.heads, shape.tokens, shape.size)
        q, k, v = (torch.randn(size, generator=random).to(dtype) for _ in range(3))
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)

    name = str(dtype).removeprefix("torch.")
    return Implementation(
        f"softmax {name}",
        "softmax",
        "scaled_dot_product_attention",
        bind,
        lambda result: result.transpose(1, 2),
        power=2,
    )


@dataclass(frozen=True)
class Row:
    """One implementation in one cell. ``share``: of the matmul rate of the same rounds (:attr:`Cell.gemm`).

    ``times_ours``: its median time over that of ours, the first native one or else torch; above 1 where ours is faster.
    Softmax attention has no ``gflops``: it does another sum, and more of it the longer the text is.
    """

    case: str
    model: str
    who: str
    kind: str
    function: str
    tokens: int
    heads: int
    size: int
    dtype: str
    turns: int
    ms: float
    fastest_ms: float
    us_per_token_head: float
    gflops: float | None
    share: float | None
    times_ours: float | None
    extra_bytes: int | None = None


@dataclass(frozen=True)
class Skipped:
    """What was not measured, and why."""

    case: str
    who: str
    tokens: int
    dtype: str
    reason: str


@dataclass(frozen=True)
class Cell:
    """A case at one length in one precision. ``gemm``: GFLOP/s of a matmul in the same rounds."""

    case: str
    tokens: int
    dtype: str
    gemm: float
    rows: tuple[Row, ...]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True)
class Plan:
    """What to measure. ``limit``: seconds that one call may take, and seconds for all turns of one in a cell.

    ``clock``: ``time.process_time`` where others use the machine too: it counts the seconds of all our threads on a
    processor, which for one thread is the time that it would take if it were alone.
    """

    tokens: tuple[int, ...] = (256, 1024, 4096)
    dtypes: tuple[torch.dtype, ...] = DTYPES
    heads: int = 16
    size: int = 128
    isas: tuple[str, ...] = field(default_factory=lambda: _in_use())
    rounds: int = 5
    limit: float = 10.0
    only: str = ""
    memory: bool = False
    clock: Clock = time.perf_counter

    def __post_init__(self) -> None:
        for isa in self.isas:
            if isa not in native.isas():
                there = ", ".join(native.isas()) or f"none ({native.reason})"
                raise ArgumentError(f"instruction set {isa!r} is not on this machine; there is: {there}")
        if not names(self.only):
            raise ArgumentError(f"no case has {self.only!r} in its name; there are: {'; '.join(names())}")

    @property
    def cases(self) -> list[Case]:
        return [case for name, case in CASES.items() if self.only in name]

    @property
    def lengths(self) -> list[int]:
        return sorted(set(self.tokens))

    def effort(self) -> int:
        """All of it, in the unit of :func:`effort_of`."""
        return len(self.dtypes) * len(self.cases) * sum(map(effort_of, self.lengths))


def _in_use() -> tuple[str, ...]:
    isa = native.isa()
    return () if isa is None else (isa,)


def effort_of(tokens: int) -> int:
    """How long a cell takes, roughly, in some unit: for the time that is left."""
    return tokens + 500


class Rates:
    """Matmuls of both precisions, and which one is the measure of a precision.

    Where bfloat16 is slower than float32 (a processor without instructions for it), the float32 rate is the measure of
    both: nobody would convert to get slower, and a share above 1 says nothing.
    """

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        self.gemms = {dtype: gemm(dtype, clock=clock) for dtype in DTYPES}
        timed = in_turn({str(dtype): one.run for dtype, one in self.gemms.items()}, rounds=3, clock=clock)
        self.rates = {d: one.rate(timed[str(d)].median) for d, one in self.gemms.items()}

    @property
    def bfloat16_is_slower(self) -> bool:
        return self.rates[torch.bfloat16] < self.rates[torch.float32]

    def measure_of(self, dtype: torch.dtype) -> Gemm:
        return self.gemms[torch.float32 if self.bfloat16_is_slower else dtype]

    def as_json(self) -> dict[str, Any]:
        return {
            "gflops": {str(d).removeprefix("torch."): rate for d, rate in self.rates.items()},
            "size": {str(d).removeprefix("torch."): one.size for d, one in self.gemms.items()},
            "bfloat16_is_slower": self.bfloat16_is_slower,
        }


def sweep(plan: Plan, rates: Rates) -> Iterator[Cell]:
    """Every cell of a plan, length after length."""
    for dtype in plan.dtypes:
        for case in plan.cases:
            series = _Series(case, dtype, plan, rates)
            for tokens in plan.lengths:
                yield series.cell(tokens)


class _Series:
    """One case in one precision at rising lengths: what was slow, or failed, is known at the next one."""

    def __init__(self, case: Case, dtype: torch.dtype, plan: Plan, rates: Rates) -> None:
        self.case, self.dtype, self.plan, self.rates = case, dtype, plan, rates
        self.left = implementations(case, plan.isas)
        self.known: dict[str, tuple[int, float]] = {}  # tokens and seconds of one call
        self.failed: dict[str, str] = {}

    def shape(self, tokens: int) -> Shape:
        return self.case.at(Shape(tokens, self.plan.heads, self.plan.size, self.dtype))

    def cell(self, tokens: int) -> Cell:
        case, shape = self.case, self.shape(tokens)
        if not self.known and not self.failed:
            self._probe(_BASE if tokens > _BASE else PROBE)
        skipped, runs = [], dict[str, Run]()
        inputs = case.inputs(shape)
        for one in self.left:
            reason = self.failed.get(one.who) or self._too_much(one, shape)
            if reason is None:
                runs[one.who] = one.bind(inputs, shape)
            else:
                skipped.append(Skipped(case.name, one.who, tokens, shape.precision, reason))
        matmul = self.rates.measure_of(self.dtype)
        timings = in_turn(
            {**runs, "": matmul.run}, rounds=self.plan.rounds, budget=self.plan.limit, clock=self.plan.clock
        )
        rate = matmul.rate(timings.pop("").median)
        del inputs, runs
        self.known |= {who: (tokens, timing.median) for who, timing in timings.items()}
        rows = self._rows(timings, shape, rate)
        return Cell(case.name, tokens, shape.precision, rate, tuple(rows), tuple(skipped))

    def _probe(self, tokens: int) -> None:
        shape = self.shape(tokens)
        inputs = self.case.inputs(shape)
        for one in self.left:
            try:
                run = one.bind(inputs, shape)
                seconds_of(run)
                self.known[one.who] = tokens, seconds_of(run, clock=self.plan.clock)
            except BackendError as error:
                self.failed[one.who] = str(error)
            except (
                Exception
            ) as error:  # another version of a peer, most likely: the others can still be measured
                self.failed[one.who] = f"failed: {type(error).__name__}: {error}"

    def _too_much(self, one: Implementation, shape: Shape) -> str | None:
        """Why not to call it at this length, or None."""
        if shape.tokens % one.multiple:
            return f"takes only multiples of {one.multiple} tokens"
        before, seconds = self.known[one.who]
        expected = seconds * (shape.tokens / before) ** one.power
        if expected > self.plan.limit:
            return f"one call would take about {expected:.0f} s (--limit {self.plan.limit:g})"
        needed, free = 4 * one.floats(shape.size) * shape.tokens * shape.heads, free_bytes()
        if free is not None and needed > 0.8 * free:
            return f"would need about {needed / 1e9:.0f} GB of memory, {free / 1e9:.0f} GB are free"
        return None

    def _rows(self, timings: dict[str, Timing], shape: Shape, rate: float) -> Iterator[Row]:
        names = [one for one in self.left if one.who in timings]
        ours = next((timings[one.who].median for one in names if one.kind in OURS), None)
        for one in names:
            timing, places = timings[one.who], shape.tokens * shape.heads
            flops = None if one.kind == "softmax" else self.case.flops(shape)
            gflops = None if flops is None else flops * places / timing.median / 1e9
            extra = None
            if self.plan.memory:
                words = (self.case.name, one.who, shape.tokens, shape.heads, shape.size, shape.precision)
                extra = memory.in_child(*words)
            yield Row(
                case=self.case.name,
                model=self.case.model,
                who=one.who,
                kind=one.kind,
                function=one.function,
                tokens=shape.tokens,
                heads=shape.heads,
                size=shape.size,
                dtype=shape.precision,
                turns=len(timing.turns),
                ms=timing.median * 1e3,
                fastest_ms=timing.fastest * 1e3,
                us_per_token_head=timing.median * 1e6 / places,
                gflops=gflops,
                share=None if gflops is None else gflops / rate,
                times_ours=None if ours is None else timing.median / ours,
                extra_bytes=extra,
            )


@dataclass(frozen=True)
class Crossover:
    """From how many tokens on one of ours is faster than softmax attention, in whichever precision that is faster.

    ``tokens`` is None where it lies outside of what was measured; ``text`` says on which side.
    """

    case: str
    dtype: str
    who: str
    tokens: int | None
    text: str


def crossovers(cells: Iterable[Cell]) -> list[Crossover]:
    """Where ours overtakes softmax attention for good, for each case and precision in the cells.

    Between two lengths time is taken as a power of T, so the ratio of two times is a line in logarithms.
    """
    series: dict[tuple[str, str, str], list[tuple[int, float]]] = {}
    for cell in sorted(cells, key=lambda cell: cell.tokens):
        softmax = [row.ms for row in cell.rows if row.kind == "softmax"]
        for row in cell.rows if softmax else ():
            if row.kind in OURS:
                points = series.setdefault((cell.case, cell.dtype, row.who), [])
                points.append((cell.tokens, math.log(row.ms / min(softmax))))
    return [Crossover(*key, *_crossing(points)) for key, points in series.items()]


def _crossing(points: list[tuple[int, float]]) -> tuple[int | None, str]:
    """Points (T, log of our time over theirs), T rising."""
    slower = [number for number, (_, log) in enumerate(points) if log >= 0]
    if not slower:
        return None, f"< {points[0][0]:,}"
    if slower[-1] == len(points) - 1:
        return None, f"> {points[-1][0]:,}"
    (t0, a), (t1, b) = points[slower[-1] : slower[-1] + 2]
    tokens = round(t0 * (t1 / t0) ** (a / (a - b)))
    return tokens, f"{tokens:,}"


def as_json(
    plan: Plan, rates: Rates | None, cells: Sequence[Cell], steps: Sequence[Step] = ()
) -> dict[str, Any]:
    """Everything of a run as one JSON-able object."""
    shape = Shape(heads=plan.heads, size=plan.size)
    return {
        "machine": machine(),
        "missing": missing(),
        "rounds": plan.rounds,
        "clock": plan.clock.__name__,
        "limit_s": plan.limit,
        "gemm": None if rates is None else rates.as_json(),
        "flops_per_token_head": {case.name: case.flops(case.at(shape)) for case in plan.cases},
        "rows": [{**asdict(row), "gemm_gflops": cell.gemm} for cell in cells for row in cell.rows],
        "skipped": [asdict(one) for cell in cells for one in cell.skipped],
        "crossovers": [asdict(one) for one in crossovers(cells)],
        "steps": [asdict(step) for step in steps],
    }
