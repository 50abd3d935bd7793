"""The chunked recurrences on a matrix state: launches of ``kernels/matrix.py``, and the gradient.

Inputs may have any strides but the last, which must be dense. One launch, or three where batch x heads would leave the chip
idle: summaries of segments, the states before them, and the segments from these states.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linstate.ops.dispatch import Call, register
from linstate.ops.native_gradient import plain
from linstate.ops.native_tensors import dense, wide
from linstate.ops.triton import table
from linstate.ops.triton.runtime import (
    LARGEST,
    boundaries,
    launch,
    operand,
    precision,
    processors,
    unfit,
)

KINDS = ("linear_attention", "delta_rule", "dplr")


def refuses(call: Call) -> str | None:
    """Why these programs do not take a call, or None."""
    if why := unfit(call):
        return why
    if not 1 <= call["k"].shape[-1] <= LARGEST or not 1 <= call["v"].shape[-1] <= LARGEST:
        return f"K and V go from 1 to {LARGEST}"
    return None


def strides(t: Tensor | None) -> tuple[int, int, int]:
    """Of batch, time and head, of a sequence ``[B, T, H, ...]``."""
    return (0, 0, 0) if t is None else (t.stride(0), t.stride(1), t.stride(2))


class Problem:
    """The sizes of a call and what every program of it is told."""

    def __init__(self, kind: int, k: Tensor, v: Tensor, g: Tensor | None, bounds: list[int] | None) -> None:
        self.kind, self.bounds = kind, bounds
        self.batch, self.tokens, self.hv, self.v = v.shape
        self.hk, self.k = k.shape[2:]
        self.gate = 0 if g is None else g.dim() - 2
        self.hg = self.hv if g is None else g.shape[2]
        self.rows = self.batch if bounds is None else len(bounds) - 1
        pairs = zip(bounds, bounds[1:], strict=False) if bounds else ()
        self.lengths = [end - begin for begin, end in pairs] or [self.tokens]
        self.longest = max(self.lengths)
        self.device, self.dtype = v.device, v.dtype
        self.narrow = v.dtype == torch.bfloat16
        self.edges = None if bounds is None else boundaries(bounds, v.device)

    def options(self, config: table.Config) -> dict[str, Any]:
        """What is fixed when a program is compiled."""
        return {
            "HV": self.hv,
            "Q_GROUP": self.hv // self.hk,
            "G_GROUP": self.hv // self.hg,
            "K": self.k,
            "V": self.v,
            "BK": table.padded(self.k),
            "BV": config.block,
            "C": config.chunk,
            "LEVELS": config.chunk.bit_length() - 1,
            "KIND": self.kind,
            "GATE": self.gate,
            "PACKED": self.bounds is not None,
            "DT": operand(self.dtype),
            "PRECISION": precision(self.dtype),
            "SOLVE": precision(self.dtype),
            "num_warps": config.warps,
            "num_stages": config.stages,
        }

    def states(self, rows: int) -> Tensor:
        return torch.empty((rows, self.hv, self.k, self.v), dtype=torch.float32, device=self.device)

    def slots(self, every: int, *, whole: bool) -> tuple[list[int], int]:
        """Where the states (or chunks) of each row begin among all, and how many a row has at most.

        A row has one for each ``every`` tokens; ``whole``: the last one may be short.
        """
        counts = [-(-n // every) if whole else n // every for n in self.lengths]
        if self.bounds is None:
            return [row * counts[0] for row in range(self.rows + 1)], counts[0]
        base = [0]
        for count in counts:
            base.append(base[-1] + count)
        return base, max(counts)

    def segments(self, config: table.Config, every: int = 0) -> tuple[int, int]:
        """(number, tokens of each); a multiple of ``every`` as well."""
        programs = self.rows * self.hv * -(-self.v // config.block)
        count = processors(self.device.index if self.device.type == "cuda" else None)
        return table.segments(programs, self.longest, count, max(config.chunk, every))

    def transitions(self, segments: int) -> Tensor:
        """Room for P of every segment: K decays in linear attention, else a matrix."""
        last = (self.k,) if self.kind == 0 else (self.k, self.k)
        return torch.empty((self.rows * segments, self.hv, *last), dtype=torch.float32, device=self.device)

    def columns(self, config: table.Config, *, summary: bool = False) -> int:
        """Blocks of columns that programs share, those of P among them."""
        extra = -(-self.k // config.block) if summary and self.kind > 0 else 0
        return -(-self.v // config.block) + extra

    def combine(
        self,
        increments: Tensor,
        transitions: Tensor,
        start: Tensor | None,
        segments: int,
        segment: int,
        *,
        backward: bool,
    ) -> Tensor:
        """The states before every segment, ``[rows * segments, HV, K, V]``; backward, behind every segment."""
        from linstate.ops.triton.kernels.matrix import combine

        starts = torch.empty_like(increments)
        block = max(16, min(table.padded(self.v), 4096 // table.padded(self.k), 64))
        launch(
            combine,
            self.rows * self.hv * -(-self.v // block),
            *(increments, transitions, start, starts, self.edges),
            *(self.tokens, segment, segments),
            HV=self.hv,
            K=self.k,
            V=self.v,
            BK=table.padded(self.k),
            BV=block,
            PART=min(32, table.padded(self.k)),
            DENSE=self.kind > 0,
            START=start is not None,
            PACKED=self.bounds is not None,
            BACKWARD=backward,
            PRECISION="tf32x3",
            num_warps=4,
        )
        return starts


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

    ``every``: 0 for none, else a multiple of the chunk (64 always is). ``training``: what is kept may be in the dtype of
    bfloat16 inputs, as that is how it is multiplied, and there is room for one more in each row.
    """
    inputs = prepare(q, k, v, a, b, beta, g)
    q, k, v, *_ = inputs
    problem = Problem(kind, k, v, g, bounds)
    config = table.forward(kind, problem.gate, problem.k, problem.v, problem.narrow)
    bonus, start = wide(bonus), wide(initial_state)
    o, after, kept = _outputs(v, problem.k, problem.rows, problem.lengths, every, training)
    segments, segment = problem.segments(config, every)
    if segments > 1:
        increments, transitions = problem.states(problem.rows * segments), problem.transitions(segments)
        _forward(problem, config, inputs, bonus, None, None, increments, None, transitions, segment, segments)
        start = problem.combine(increments, transitions, start, segments, segment, backward=False)
    _forward(
        problem, config, inputs, bonus, o, start, after, kept, None, segment, segments, every, scale, training
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
        *(*strides(q), *strides(k), *strides(v), *strides(a), *strides(b), *strides(beta), *strides(g)),
        *(problem.tokens, segment, segments, max(every, 1), per_row, scale),
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


_matrix = torch.library.custom_op("linstate::triton_matrix", run, mutates_args=())


@_matrix.register_fake
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
    problem = (
        [v.shape[1]] if bounds is None else [e - b for b, e in zip(bounds, bounds[1:], strict=False)]
    )
    rows = v.shape[0] if bounds is None else len(problem)
    return _outputs(v, k.shape[-1], rows, problem, every, training)


def run_backward(
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
    kept: Tensor,
    grad_o: Tensor,
    grad_after: Tensor,
    scale: float,
    bounds: list[int] | None,
) -> list[Tensor]:
    """Gradients of q, k, v, a, b, beta, g, bonus and the initial state; of what was not given, an empty tensor."""
    from linstate.ops.triton.kernels.matrix_gradient import gradients, sweep

    inputs = prepare(q, k, v, a, b, beta, g)
    grad_o = dense(grad_o)  # type: ignore[assignment]
    problem = Problem(kind, k, v, g, bounds)
    config, of_chunk = table.backward(kind, problem.gate, problem.k, problem.v, problem.narrow)
    bonus_wide, start = wide(bonus), wide(initial_state)
    base, per_row = problem.slots(config.chunk, whole=True)
    at = None if bounds is None else torch.tensor(base, device=v.device)
    kept_gradient = kept.new_empty((base[-1], *kept.shape[1:]))
    dv, dstart = v.new_empty(v.shape), problem.states(problem.rows)
    segments, segment = problem.segments(config)

    def go(ends: Tensor | None, into: Tensor, transitions: Tensor | None) -> None:
        summary = transitions is not None
        q, k, v, a, b, beta, g = inputs
        launch(
            sweep,
            problem.rows * problem.hv * segments * problem.columns(config, summary=summary),
            *(q, k, a, b, beta, g, bonus_wide, grad_o, dv, ends, kept_gradient, into, transitions),
            *(problem.edges, at),
            *(*strides(q), *strides(k), *strides(a), *strides(b), *strides(beta), *strides(g), *strides(grad_o)),
            *(problem.tokens, segment, segments, per_row, scale),
            BONUS=bonus is not None,
            SUMMARY=summary,
            **problem.options(config),
        )

    ends = wide(grad_after)
    if segments > 1:
        increments, transitions = problem.states(problem.rows * segments), problem.transitions(segments)
        go(None, increments, transitions)
        ends = problem.combine(increments, transitions, ends, segments, segment, backward=True)
    go(ends, dstart, None)

    shape = (problem.batch, problem.tokens, problem.hv)
    partial = torch.float32 if problem.hv != problem.hk else v.dtype
    dq, dk = v.new_empty((*shape, problem.k), dtype=partial), v.new_empty((*shape, problem.k), dtype=partial)
    da, db = (None if t is None else v.new_empty((*shape, problem.k), dtype=partial) for t in (a, b))
    dbeta = None if beta is None else v.new_empty(shape, dtype=beta.dtype)
    dg = None
    if g is not None:
        of_gate = torch.float32 if problem.hg != problem.hv else g.dtype
        dg = v.new_empty((*shape, *g.shape[3:]), dtype=of_gate)
    dbonus = None if bonus is None else v.new_empty((base[-1], problem.hv, problem.k), dtype=torch.float32)
    row_of = None
    if bounds is not None:
        counts = torch.tensor([end - begin for begin, end in zip(base, base[1:], strict=False)])
        row_of = torch.arange(problem.rows).repeat_interleave(counts).to(v.device)
    q, k, v, a, b, beta, g = inputs
    tensors = (q, k, v, a, b, beta, g)
    launch(
        gradients,
        base[-1] * problem.hv,
        *(*tensors, bonus_wide, grad_o, start, kept, kept_gradient, dq, dk, da, db, dbeta, dg, dbonus),
        *(problem.edges, at, row_of),
        *(step for t in (*tensors, grad_o) for step in strides(t)),
        *(problem.tokens, per_row, scale),
        BONUS=bonus is not None,
        START=start is not None,
        **problem.options(of_chunk),
    )
    grouped = [
        _of_group(dq, q),
        _of_group(dk, k),
        dv,
        _of_group(da, a),
        _of_group(db, b),
        dbeta,
        _of_group(dg, g),
        None if dbonus is None or bonus is None else dbonus.sum(0).to(bonus.dtype),
        None if initial_state is None else dstart.to(initial_state.dtype),
    ]
    return [v.new_empty(0) if t is None else t for t in grouped]


def _of_group(gradient: Tensor | None, t: Tensor | None) -> Tensor | None:
    """The gradient of value heads, summed over those that share one of t's heads, in t's dtype."""
    if gradient is None or t is None or gradient.shape[2] == t.shape[2]:
        return gradient
    return gradient.unflatten(2, (t.shape[2], -1)).sum(3).to(t.dtype)


_matrix_backward = torch.library.custom_op("linstate::triton_matrix_backward", run_backward, mutates_args=())


@_matrix_backward.register_fake
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
    kept: Tensor,
    grad_o: Tensor,
    grad_after: Tensor,
    scale: float,
    bounds: list[int] | None,
) -> list[Tensor]:
    tensors = (q, k, v, a, b, beta, g, bonus, initial_state)
    return [v.new_empty(0) if t is None else t.new_empty(t.shape) for t in tensors]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.kind, *tensors, ctx.scale, ctx.bounds, _, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)
    ctx.after = output[1].shape


def _backward(
    ctx: Any, grad_o: Tensor | None, grad_after: Tensor | None, grad_kept: Tensor | None
) -> tuple[Any, ...]:
    *tensors, kept = ctx.saved_tensors
    v = tensors[2]
    grad_o = torch.zeros_like(v) if grad_o is None else grad_o
    grad_after = v.new_zeros(ctx.after, dtype=torch.float32) if grad_after is None else grad_after
    found = torch.ops.linstate.triton_matrix_backward(
        ctx.kind, *tensors, kept, grad_o, grad_after, ctx.scale, ctx.bounds
    )
    given = [None if t is None else gradient for t, gradient in zip(tensors, found, strict=True)]
    return None, *given, None, None, None, None


_matrix.register_autograd(_backward, setup_context=_remember)


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
) -> tuple[Tensor, Tensor]:
    """One of ``KINDS``; arguments as in the op, checked."""
    tensors = (q, k, v, a, b, beta, g, bonus, initial_state)
    direct, learning = plain(*tensors)
    every = 0
    if learning:
        gate = 0 if g is None else g.dim() - 2
        narrow = v.dtype == torch.bfloat16
        every = table.backward(kind, gate, k.shape[-1], v.shape[-1], narrow)[0].chunk
    call = run if direct else torch.ops.linstate.triton_matrix
    o, after, _ = call(kind, *tensors, scale, bounds, every, learning)
    return o, after


def register_chunked(kind: int) -> None:
    """Enter the programs of one of ``KINDS`` into the backend table."""

    @register(KINDS[kind], "chunked", "triton", refuses=refuses, packs=True)
    def triton_chunked(**arguments: Any) -> tuple[Tensor, Tensor]:
        return chunked(kind, **arguments)


for _kind in range(len(KINDS)):
    register_chunked(_kind)
