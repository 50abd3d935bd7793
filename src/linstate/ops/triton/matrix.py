"""The chunked recurrences on a matrix state: launches of ``kernels/prepare.py`` and ``kernels/matrix.py``.

Inputs may have any strides but the last, which must be dense. Two launches, or four where batch x heads would leave the chip
idle: summaries of segments, the states before them, and the segments from these states.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from linstate.ops import library
from linstate.ops.dispatch import Call, register
from linstate.ops.tensors import dense, keeps, plain, wide
from linstate.ops.triton import table
from linstate.ops.triton.problem import Problem, combine, strides
from linstate.ops.triton.problem import snapshots as of_rows
from linstate.ops.triton.runtime import LARGEST, launch, unfit

KINDS = ("linear_attention", "delta_rule", "dplr")


def refuses(call: Call) -> str | None:
    """Why these programs do not take a call, or None."""
    if why := unfit(call):
        return why
    if not 1 <= call["k"].shape[-1] <= LARGEST or not 1 <= call["v"].shape[-1] <= LARGEST:
        return f"K and V go from 1 to {LARGEST}"
    return None


Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""q, k, v, a, b, beta, g."""


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    beta: Tensor | None,
    g: Tensor | None,
) -> Inputs:
    """As the programs read them: the last axis dense, where there is a fourth."""
    g = dense(g) if g is not None and g.dim() == 4 else g
    return dense(q), dense(k), dense(v), dense(a), dense(b), beta, g  # type: ignore[return-value]


OPTIONS = ("FUSED", "DECAY", "OFFSET", "UNIT", "STEPPED")


@dataclass(frozen=True)
class Fused:
    """What ``prepare`` does of a mixer's work in passing, in the program's order: what is multiplied into keys (RWKV-7), what gates are made of; numbers;
    constants. ``skip``: what of v goes past the state, which is ``forward``'s."""

    tensors: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None] = (None,) * 4
    numbers: tuple[float, ...] = (0.0,) * 5
    options: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(OPTIONS, 0))
    skip: Tensor | None = None


NOTHING_FUSED = Fused()


@dataclass(frozen=True)
class Prepared:
    """What ``forward`` reads: rows (those that read the system, q, k, v, a), squares of chunks, factors of tokens, decays of whole chunks.

    ``group``: value heads that share a head of the rows.
    """

    q: Tensor
    r: Tensor
    k: Tensor
    v: Tensor
    a: Tensor | None
    squares: tuple[Tensor | None, ...]
    lines: tuple[Tensor | None, Tensor | None, Tensor | None]
    totals: Tensor | None
    group: int


def run(
    kind: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    beta: Tensor | None,
    g: Tensor | None,
    bonus: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    bounds: list[int] | None,
    every: int,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """o, the states after the last tokens, and those behind every ``every`` tokens ``[sum of T // every, HV, K, V]``.

    ``every``: 0 for none, else 16, 32 or a multiple of 64. ``training``: what is kept may be in the dtype of
    bfloat16 inputs, as that is how it is multiplied, and there is room for one more in each row.
    """
    inputs = prepare(q, k, v, a, b, beta, g)
    return read(kind, inputs, bonus, initial_state, scale, bounds, every, training)


def read(
    kind: int,
    inputs: Inputs,
    bonus: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    bounds: list[int] | None,
    every: int,
    training: bool,
    fused: Fused = NOTHING_FUSED,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`run` of prepared inputs, of a mixer's raw ones where something is ``fused``."""
    _, k, v, *_, g = inputs
    problem = Problem(kind, k, v, g, bounds)
    config = table.forward(kind, problem.gate, problem.k, problem.v, problem.wide)
    if every and every % config.chunk:
        config = replace(config, chunk=every)
    start = wide(initial_state)
    o, after, kept = outputs(v, problem.k, problem.rows, problem.lengths, every, training)
    rows = _prepare(problem, config.chunk, inputs, wide(bonus), fused)
    segments, segment = problem.segments(config, every)
    if segments > 1:
        increments, transitions = problem.states(problem.rows * segments), problem.transitions(segments)
        cut = (segment, segments, segments - 1)
        _forward(problem, config, rows, None, None, increments, None, transitions, cut)
        start = combine(problem, increments, transitions, start, segments, segment, backward=False)
    cut = (segment, segments, segments)
    _forward(problem, config, rows, o, start, after, kept, None, cut, every, scale, training, fused.skip)
    return o, after, kept


def _prepare(problem: Problem, chunk: int, inputs: Inputs, bonus: Tensor | None, fused: Fused) -> Prepared:
    from linstate.ops.triton.kernels.prepare import prepare as program

    q, k, v, a, b, beta, g = inputs
    kind, gate, heads = problem.kind, problem.gate, problem.hv
    options = fused.options
    lines = gate < 2 and bool(gate or options["UNIT"])
    mixed = bool(options["FUSED"] and options["STEPPED"] and kind == 2)  # the values with the first layer's
    whole = (problem.batch, problem.tokens, heads)

    def square(used: bool) -> Tensor | None:
        shape = (problem.batch, heads, problem.tokens, chunk)
        return v.new_empty(shape, dtype=torch.float32 if problem.wide else v.dtype) if used else None

    def line(used: bool) -> Tensor | None:
        shape = (problem.batch, heads, problem.tokens)
        return v.new_empty(shape, dtype=torch.float32) if used else None

    def rows(used: bool) -> Tensor | None:
        dtype = torch.float32 if problem.wide else v.dtype
        return v.new_empty((*whole, problem.k), dtype=dtype) if used and gate == 2 else None

    of_system = square(kind > 0), square(kind > 0 and not problem.wide)
    squares = square(True), *of_system, square(kind == 2), square(kind == 2)
    of_tokens = line(lines), line(lines and kind > 0), line(lines)
    made = rows(True), rows(kind > 0), rows(True), rows(kind == 2)
    places = problem.batch * problem.tokens // chunk + problem.rows
    last = problem.k if gate == 2 else 1
    totals = v.new_empty((places, heads, last), dtype=torch.float32) if gate else None
    values = v.new_empty(v.shape) if mixed else None
    halves = 1 if chunk < 32 else 2
    chunks = -(-problem.longest // chunk)
    config = table.prepare(kind, gate, problem.k, problem.wide)
    launch(
        program,
        problem.rows * heads * chunks,
        *(q, k, v, a, b, beta, g, bonus, *squares, *of_tokens, totals, *made, values, problem.edges),
        *fused.tensors,
        *(*strides(q), *strides(k), *strides(v), *strides(a), *strides(b), *strides(beta), *strides(g)),
        *(problem.tokens, max(chunks, 1)),
        *fused.numbers,
        KB=config.block,
        H=chunk // halves,
        HALVES=halves,
        LEVELS=(chunk // halves).bit_length() - 1,
        G_GROUP=heads // problem.hg,
        LINES=lines,
        BONUS=bonus is not None,
        **options,
        **problem.options(config),
    )
    q_rows, r_rows, k_rows, a_rows = made
    if q_rows is None or k_rows is None:
        return Prepared(q, b if kind == 2 else k, k, v, a, squares, of_tokens, totals, heads // problem.hk)  # type: ignore[arg-type]
    reading = k_rows if r_rows is None else r_rows
    return Prepared(
        q_rows, reading, k_rows, v if values is None else values, a_rows, squares, of_tokens, totals, 1
    )


def _forward(
    problem: Problem,
    config: table.Config,
    rows: Prepared,
    o: Tensor | None,
    start: Tensor | None,
    after: Tensor,
    kept: Tensor | None,
    transitions: Tensor | None,
    cut: tuple[int, int, int],
    every: int = 0,
    scale: float = 1.0,
    training: bool = False,
    skip: Tensor | None = None,
) -> None:
    """``cut``: tokens of a segment, their number, and how many of them are read."""
    from linstate.ops.triton.kernels.matrix import forward

    summary = transitions is not None
    keep = kept is not None and kept.numel() > 0
    base, per_row = problem.slots(every, whole=training) if keep else ([], 0)
    at = torch.tensor(base, device=after.device) if keep and problem.bounds is not None else None
    read = (rows.q, rows.r, rows.k, rows.v, rows.a)
    launch(
        forward,
        problem.rows * problem.hv * cut[2] * problem.columns(config, summary=summary),
        *(*read, *rows.squares, *rows.lines, rows.totals, skip),
        *(o, start, after, kept, transitions, problem.edges, at),
        *(step for t in read for step in strides(t)),
        *(problem.tokens, *cut, max(every, 1), per_row, scale),
        **{**problem.options(config), "Q_GROUP": rows.group},
        C=config.chunk,
        LINES=rows.lines[0] is not None,
        START=start is not None,
        KEEP=keep,
        SUMMARY=summary,
        SKIP=skip is not None,
    )


def outputs(
    v: Tensor, k_dim: int, rows: int, lengths: list[int], every: int, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _, _, heads, v_dim = v.shape
    packed = rows if len(lengths) == 1 and rows > 1 else 1
    count = packed * sum(-(-n // every) if training else n // every for n in lengths) if every else 0
    narrow = training and v.dtype == torch.bfloat16
    kept = v.new_empty((count, heads, k_dim, v_dim), dtype=torch.bfloat16 if narrow else torch.float32)
    after = v.new_empty((rows, heads, k_dim, v_dim), dtype=torch.float32)
    return v.new_empty(v.shape), after, kept


def chunked(
    kind: int,
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    initial_state: Tensor | None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    beta: Tensor | None = None,
    g: Tensor | None = None,
    bonus: Tensor | None = None,
    bounds: list[int] | None = None,
    snapshots: int | None = None,
) -> tuple[Tensor, Tensor]:
    """One of ``KINDS``; arguments as in the op, checked. ``snapshots`` only where no gradient is asked for."""
    tensors = (q, k, v, a, b, beta, g, bonus, initial_state)
    if snapshots is not None:
        o, after, kept = run(kind, *tensors, scale, bounds, snapshots, False)
        return o, of_rows(kept, after, v.shape[1], bounds, snapshots)
    direct, learning = plain(*tensors)
    every = 0
    if learning:
        gate = 0 if g is None else g.dim() - 2
        every = table.backward(kind, gate, k.shape[-1], v.shape[-1], v.dtype != torch.bfloat16)[0].chunk
    if direct:
        o, after, _ = run(kind, *tensors, scale, bounds, every, False)
    else:
        o, after, _ = library.matrix("triton", KINDS[kind], *tensors, scale, bounds, every)
    return o, after


def register_chunked(kind: int) -> None:
    """Enter the programs of one of ``KINDS`` into the backend table."""

    @register(KINDS[kind], "chunked", "triton", refuses=refuses, packs=True, keeps=keeps)
    def triton_chunked(**arguments: Any) -> tuple[Tensor, Tensor]:
        return chunked(kind, **arguments)


for _kind in range(len(KINDS)):
    register_chunked(_kind)
