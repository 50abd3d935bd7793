"""The gradient of the chunked recurrences on a matrix state: launches of ``kernels/matrix_gradient.py``.

A sweep from the last chunk to the first, by segments where forward is, and then every chunk by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linstate.ops import library
from linstate.ops.tensors import dense, wide
from linstate.ops.triton import table
from linstate.ops.triton.matrix import KINDS, outputs, prepare, run
from linstate.ops.triton.problem import Problem, combine, strides
from linstate.ops.triton.runtime import launch


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
    config, of_chunk = table.backward(kind, problem.gate, problem.k, problem.v, problem.wide)
    bonus_wide, start = wide(bonus), wide(initial_state)
    base, per_row = problem.slots(config.chunk, whole=True)
    at = None if bounds is None else torch.tensor(base, device=v.device)
    kept_gradient = kept.new_empty((base[-1], *kept.shape[1:]))
    dv, dstart = v.new_empty(v.shape), problem.states(problem.rows)
    segments, segment = problem.segments(config)

    def go(ends: Tensor | None, into: Tensor, transitions: Tensor | None) -> None:
        summary = transitions is not None
        q, k, _, a, b, beta, g = inputs
        launch(
            sweep,
            problem.rows * problem.hv * segments * problem.columns(config, summary=summary),
            *(q, k, a, b, beta, g, bonus_wide, grad_o, dv, ends, kept_gradient, into, transitions),
            *(problem.edges, at),
            *(
                *strides(q),
                *strides(k),
                *strides(a),
                *strides(b),
                *strides(beta),
                *strides(g),
                *strides(grad_o),
            ),
            *(problem.tokens, segment, segments, per_row, scale),
            BONUS=bonus is not None,
            SUMMARY=summary,
            **problem.by_chunks(config),
        )

    ends = wide(grad_after)
    if segments > 1:
        increments, transitions = problem.states(problem.rows * segments), problem.transitions(segments)
        go(None, increments, transitions)
        ends = combine(problem, increments, transitions, ends, segments, segment, backward=True)
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
        **problem.by_chunks(of_chunk),
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


def _run(recurrence: str, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    every = arguments[-1]
    return run(KINDS.index(recurrence), *arguments, every > 0)  # type: ignore[call-arg]


def _outputs(recurrence: str, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Of :func:`_run`."""
    _, k, v, *_, bounds, every = arguments
    lengths = [v.shape[1]] if bounds is None else [e - b for b, e in zip(bounds, bounds[1:], strict=False)]
    rows = v.shape[0] if bounds is None else len(lengths)
    return outputs(v, k.shape[-1], rows, lengths, every, every > 0)


def _backward(recurrence: str, *arguments: Any) -> list[Tensor]:
    *given, _ = arguments  # how far apart states are, the table says
    return run_backward(KINDS.index(recurrence), *given)


library.MATRIX["triton"] = library.Kernels(_run, _outputs, _backward)
