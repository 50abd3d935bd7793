"""The chunked recurrences on a matrix state: launches of ``kernels/matrix.py``, and the gradient.

Inputs may have any strides but the last, which must be dense. One launch, or three where batch x heads would leave the chip
idle: summaries of segments, the states before them, and the segments from these states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from linstate.ops.dispatch import Call, register
from linstate.ops.native_gradient import plain
from linstate.ops.native_tensors import dense, keeps, wide
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


@dataclass(frozen=True)
class Fused:
    """What ``forward`` is told where it does a mixer's work in passing: tensors, numbers and constants, in the program's order."""

    tensors: tuple[Tensor | None, ...]
    numbers: tuple[float, ...]
    options: dict[str, Any]


OPTIONS = (
    "FUSED",
    "W",
    "WP",
    "D",
    "Q_AT",
    "K_AT",
    "V_AT",
    "BIAS",
    "TAIL",
    "DECAY",
    "OFFSET",
    "UNIT",
    "STEPPED",
    "SKIP",
)
NOTHING_FUSED = Fused((None,) * 7, (0.0,) * 5, dict.fromkeys(OPTIONS, 0))


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

    ``every``: 0 for none, else a multiple of the chunk (32 always is). ``training``: what is kept may be in the dtype of
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
    bonus, start = wide(bonus), wide(initial_state)
    o, after, kept = _outputs(v, problem.k, problem.rows, problem.lengths, every, training)
    segments, segment = problem.segments(config, every)
    if segments > 1:
        increments, transitions = problem.states(problem.rows * segments), problem.transitions(segments)
        _forward(
            *(problem, config, inputs, bonus, None, None, increments, None, transitions, segment, segments),
            fused=fused,
        )
        start = combine(problem, increments, transitions, start, segments, segment, backward=False)
    _forward(
        problem,
        config,
        inputs,
        bonus,
        o,
        start,
        after,
        kept,
        None,
        segment,
        segments,
        every,
        scale,
        training,
        fused,
    )
    return o, after, kept


def _forward(
    problem: Problem,
    config: table.Config,
    inputs: Inputs,
    bonus: Tensor | None,
    o: Tensor | None,
    start: Tensor | None,
    after: Tensor,
    kept: Tensor | None,
    transitions: Tensor | None,
    segment: int,
    segments: int,
    every: int = 0,
    scale: float = 1.0,
    training: bool = False,
    fused: Fused = NOTHING_FUSED,
) -> None:
    from linstate.ops.triton.kernels.matrix import forward

    q, k, v, a, b, beta, g = inputs
    summary = transitions is not None
    keep = kept is not None and kept.numel() > 0
    base, per_row = problem.slots(every, whole=training) if keep else ([], 0)
    at = torch.tensor(base, device=v.device) if keep and problem.bounds is not None else None
    launch(
        forward,
        problem.rows * problem.hv * segments * problem.columns(config, summary=summary),
        *(q, k, v, a, b, beta, g, bonus, o, start, after, kept, transitions, problem.edges, at),
        *fused.tensors,
        *(*strides(q), *strides(k), *strides(v), *strides(a), *strides(b), *strides(beta), *strides(g)),
        *(problem.tokens, segment, segments, max(every, 1), per_row, scale),
        *fused.numbers,
        **fused.options,
        BONUS=bonus is not None,
        START=start is not None,
        KEEP=keep,
        SUMMARY=summary,
        **problem.options(config),
    )


def _outputs(
    v: Tensor, k_dim: int, rows: int, lengths: list[int], every: int, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _, _, heads, v_dim = v.shape
    packed = rows if len(lengths) == 1 and rows > 1 else 1
    count = packed * sum(-(-n // every) if training else n // every for n in lengths) if every else 0
    narrow = training and v.dtype == torch.bfloat16
    kept = v.new_empty((count, heads, k_dim, v_dim), dtype=torch.bfloat16 if narrow else torch.float32)
    after = v.new_empty((rows, heads, k_dim, v_dim), dtype=torch.float32)
    return v.new_empty(v.shape), after, kept


# For torch.compile, fake tensors and gradients; a plain call does not pay for it.
MATRIX = torch.library.custom_op("linstate::triton_matrix", run, mutates_args=())


@MATRIX.register_fake
def _(
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
    problem = [v.shape[1]] if bounds is None else [e - b for b, e in zip(bounds, bounds[1:], strict=False)]
    rows = v.shape[0] if bounds is None else len(problem)
    return _outputs(v, k.shape[-1], rows, problem, every, training)


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
    call = run if direct else torch.ops.linstate.triton_matrix
    o, after, _ = call(kind, *tensors, scale, bounds, every, learning)
    return o, after


def register_chunked(kind: int) -> None:
    """Enter the programs of one of ``KINDS`` into the backend table."""

    @register(KINDS[kind], "chunked", "triton", refuses=refuses, packs=True, keeps=keeps)
    def triton_chunked(**arguments: Any) -> tuple[Tensor, Tensor]:
        return chunked(kind, **arguments)


for _kind in range(len(KINDS)):
    register_chunked(_kind)
