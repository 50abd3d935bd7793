"""The elementwise scan and the short convolution on a GPU, with their gradients and their steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linstate.ops import library
from linstate.ops.dispatch import Call, register
from linstate.ops.tensors import dense, keeps, plain, wide
from linstate.ops.triton import table
from linstate.ops.triton.problem import Problem, combine, strides
from linstate.ops.triton.problem import snapshots as of_rows
from linstate.ops.triton.runtime import boundaries, launch, unfit

SPAN = 64
"""Tokens between the states that a call with a gradient keeps."""

# ------------------------------------------------------------------------------------------ the elementwise scan


def refuses(call: Call) -> str | None:
    """Why the scan does not take a call, or None."""
    why = unfit(call)
    if why is None and call["k"] is not None and call["k"].shape[-1] > table.SCAN_STATE:
        why = f"K goes up to {table.SCAN_STATE}"
    return why


@register("selective_scan", "step", "triton", refuses=refuses)
@register("selective_scan", "chunked", "triton", refuses=refuses, packs=True, keeps=keeps)
def selective_scan(
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor,
    g: Tensor,
    A: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    bounds: list[int] | None = None,
    snapshots: int | None = None,
) -> tuple[Tensor, Tensor]:
    """See the module; arguments as in :func:`linstate.ops.selective_scan`."""
    tensors = (q, k, v, g, A, initial_state)
    if snapshots is not None:  # no gradient is asked for
        o, after, kept = run_scan(*tensors, scale, bounds, snapshots)
        return o, of_rows(kept, after, v.shape[1], bounds, snapshots)
    direct, learning = plain(*tensors)
    if direct:
        o, after, _ = run_scan(*tensors, scale, bounds, 0)
    else:
        o, after, _ = library.selective_scan("triton", *tensors, scale, bounds, SPAN if learning else 0)
    return o, after


def _problem(q: Tensor | None, v: Tensor, bounds: list[int] | None) -> Problem:
    """The sizes of a scan; without q and k, K is one."""
    return Problem(0, v[..., :1] if q is None else q, v, None, bounds)


def _options(problem: Problem, q: Tensor | None, rates: Tensor | None) -> dict[str, Any]:
    config = table.scan(problem.k, problem.v)
    return {
        "HV": problem.hv,
        "Q_GROUP": problem.hv // problem.hk,
        "K": problem.k,
        "V": problem.v,
        "BK": table.power(problem.k),
        "BV": config.block,
        "READS": q is not None,
        "RATES": rates is not None,
        "PACKED": problem.bounds is not None,
        "num_warps": config.warps,
    }


def run_scan(
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor,
    g: Tensor,
    A: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    bounds: list[int] | None,
    every: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """o, the states after the last tokens, and those behind every ``every`` tokens ``[sum of T // every, HV, K, V]``."""
    q, k, v, g = dense(q), dense(k), dense(v), dense(g)  # type: ignore[assignment]
    rates, start = wide(A), wide(initial_state)
    problem = _problem(q, v, bounds)
    options = _options(problem, q, rates)
    o, after, kept = _scan_outputs(q, v, bounds, every)
    segments, segment = problem.segments(table.scan(problem.k, problem.v), every)
    base, per_row = problem.slots(every, whole=False) if kept.numel() else ([], 0)
    at = torch.tensor(base, device=v.device) if base and bounds is not None else None

    def go(
        o: Tensor | None, start: Tensor | None, after: Tensor, kept: Tensor | None, transitions: Tensor | None
    ) -> None:
        from linstate.ops.triton.kernels.scan import scan

        keep = kept is not None and kept.numel() > 0
        launch(
            scan,
            problem.rows * problem.hv * segments * -(-problem.v // options["BV"]),
            *(q, k, v, g, rates, o, start, after, kept, transitions, problem.edges, at, None),
            *(*strides(q), *strides(k), *strides(v), *strides(g)),
            *(problem.tokens, segment, segments, max(1, every), per_row, scale),
            START=start is not None,
            KEEP=keep,
            SUMMARY=transitions is not None,
            SLOTS=False,
            **options,
        )

    if segments > 1:
        increments, transitions = (problem.states(problem.rows * segments) for _ in range(2))
        go(None, None, increments, None, transitions)
        start = combine(problem, increments, transitions, start, segments, segment, backward=False)
    go(o, start, after, kept, None)
    return o, after, kept


def _scan_outputs(
    q: Tensor | None, v: Tensor, bounds: list[int] | None, every: int
) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, heads, v_dim = v.shape
    lengths = (
        [tokens] * batch if bounds is None else [e - b for b, e in zip(bounds, bounds[1:], strict=False)]
    )
    k_dim = 1 if q is None else q.shape[-1]
    count = sum(n // every for n in lengths) if every else 0
    kept = v.new_empty((count, heads, k_dim, v_dim), dtype=torch.float32)
    after = v.new_empty((len(lengths), heads, k_dim, v_dim), dtype=torch.float32)
    return v.new_empty(v.shape), after, kept


def run_scan_backward(
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor,
    g: Tensor,
    A: Tensor | None,
    initial_state: Tensor | None,
    kept: Tensor,
    grad_o: Tensor,
    grad_after: Tensor,
    scale: float,
    bounds: list[int] | None,
) -> list[Tensor]:
    """Gradients of q, k, v, g, A and the initial state; of what was not given, an empty tensor."""
    from linstate.ops.triton.kernels.scan import scan_gradients

    given = (q, k, v, g, A, initial_state)
    q, k, v, g, grad_o = dense(q), dense(k), dense(v), dense(g), dense(grad_o)  # type: ignore[assignment]
    rates, start, end = wide(A), wide(initial_state), wide(grad_after)
    problem = _problem(q, v, bounds)
    options = _options(problem, q, rates)
    base, per_row = problem.slots(SPAN, whole=False)
    at = None if bounds is None else torch.tensor(base, device=v.device)
    blocks = -(-problem.v // options["BV"])
    programs = problem.rows * problem.hv * blocks
    scratch = kept.new_empty((programs, SPAN, options["BK"], options["BV"]))
    partial = (blocks, problem.batch, problem.tokens, problem.hv, problem.k)
    dq, dk = (None if t is None else kept.new_empty(partial) for t in (q, k))
    dv, dg = v.new_empty(v.shape), v.new_empty(g.shape, dtype=g.dtype)
    drates = None if rates is None else problem.states(problem.rows)
    dstart = problem.states(problem.rows)
    launch(
        scan_gradients,
        programs,
        *(q, k, v, g, rates, grad_o, start, kept, end, scratch, dq, dk, dv, dg, drates, dstart),
        *(problem.edges, at),
        *(*strides(q), *strides(k), *strides(v), *strides(g), *strides(grad_o)),
        *(problem.batch * problem.tokens, problem.tokens, SPAN, per_row, scale),
        START=start is not None,
        **options,
    )
    if dq is not None and dk is not None and q is not None:
        dq, dk = (t.sum(0).unflatten(2, (q.shape[2], -1)).sum(3) for t in (dq, dk))
    if drates is not None:
        drates = drates.sum(0)
    found = (dq, dk, dv, dg, drates, dstart)
    return [
        v.new_empty(0) if t is None or gradient is None else gradient.to(t.dtype)
        for t, gradient in zip(given, found, strict=True)
    ]


def _outputs(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Of :func:`run_scan`."""
    q, _, v, *_, bounds, every = arguments
    return _scan_outputs(q, v, bounds, every)


def _scan_backward(*arguments: Any) -> list[Tensor]:
    *given, _ = arguments  # states are SPAN apart
    return run_scan_backward(*given)


library.SCAN["triton"] = library.Kernels(run_scan, _outputs, _scan_backward)


# ---------------------------------------------------------------------------------------- the short convolution


@register("causal_conv1d", "step", "triton", refuses=unfit)
@register("causal_conv1d", "chunked", "triton", refuses=unfit, packs=True)
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    bounds: list[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """See the module; arguments as in :func:`linstate.ops.causal_conv1d`."""
    tensors = (x, weight, bias, initial_state)
    direct, _ = plain(*tensors)
    if direct:
        return run_conv(*tensors, activation, bounds)
    y, after = library.causal_conv1d("triton", *tensors, activation, bounds)
    return y, after


class _Conv:
    """Sizes of a convolution and what its programs are told. ``extra``: places beyond the tokens."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        start: Tensor | None,
        activation: str | None,
        bounds: list[int] | None,
        extra: int,
    ) -> None:
        batch, self.tokens, channels = x.shape
        self.rows = batch if bounds is None else len(bounds) - 1
        lengths = [e - b for b, e in zip(bounds, bounds[1:], strict=False)] if bounds else [self.tokens]
        self.edges = None if bounds is None else boundaries(bounds, x.device)
        longest = max(lengths) + extra
        config = table.conv(channels, longest)
        self.spans = max(1, -(-longest // config.chunk))
        self.programs = self.rows * self.spans * -(-channels // config.block)
        self.options = {
            "D": channels,
            "W": weight.shape[1],
            "BT": config.chunk,
            "BD": config.block,
            "BIAS": bias is not None,
            "SILU": activation == "silu",
            "START": start is not None,
            "PACKED": bounds is not None,
            "num_warps": config.warps,
        }


def run_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    activation: str | None,
    bounds: list[int] | None,
) -> tuple[Tensor, Tensor]:
    """y and the last W - 1 inputs."""
    from linstate.ops.triton.kernels.conv import conv

    x = x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()
    weight, start = weight.contiguous(), wide(initial_state)
    bias = None if bias is None else bias.contiguous()
    y, after = _conv_outputs(x, weight, bounds)
    sizes = _Conv(x, weight, bias, start, activation, bounds, 0)
    tensors = (x, weight, bias, y, start, after, sizes.edges, None)
    numbers = (x.stride(0), x.stride(1), sizes.tokens, sizes.spans)
    launch(conv, sizes.programs, *tensors, *numbers, SLOTS=False, **sizes.options)
    return y, after


def _conv_outputs(x: Tensor, weight: Tensor, bounds: list[int] | None) -> tuple[Tensor, Tensor]:
    rows = x.shape[0] if bounds is None else len(bounds) - 1
    after = x.new_empty((rows, weight.shape[1] - 1, x.shape[2]), dtype=torch.float32)
    return x.new_empty(x.shape), after


def run_conv_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    grad_y: Tensor,
    grad_after: Tensor,
    activation: str | None,
    bounds: list[int] | None,
) -> list[Tensor]:
    """Gradients of x, weight, bias and the initial state; of what was not given, an empty tensor."""
    from linstate.ops.triton.kernels.conv import conv_gradients

    x, grad_y = (t if t.stride(2) == 1 or t.shape[2] == 1 else t.contiguous() for t in (x, grad_y))
    kernel, start, end = weight.contiguous(), wide(initial_state), wide(grad_after)
    offset = None if bias is None else bias.contiguous()
    sizes = _Conv(x, kernel, offset, start, activation, bounds, weight.shape[1] - 1)
    dx, dstart = x.new_empty(x.shape), x.new_empty(grad_after.shape, dtype=torch.float32)
    parts = sizes.rows * sizes.spans
    dweight = x.new_empty((parts, *weight.shape), dtype=torch.float32)
    dbias = None if bias is None else x.new_empty((parts, x.shape[2]), dtype=torch.float32)
    tensors = (x, kernel, offset, grad_y, end, start, dx, dstart, dweight, dbias, sizes.edges)
    numbers = (x.stride(0), x.stride(1), grad_y.stride(0), grad_y.stride(1), sizes.tokens, sizes.spans)
    launch(conv_gradients, sizes.programs, *tensors, *numbers, **sizes.options)
    return [  # each a tensor of its own, as torch.library wants
        dx,
        dweight.sum(0).to(weight.dtype),
        x.new_empty(0) if dbias is None or bias is None else dbias.sum(0).to(bias.dtype),
        x.new_empty(0) if initial_state is None else dstart.to(initial_state.dtype),
    ]


def _outputs_of_conv(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Of :func:`run_conv`."""
    x, weight, *_, bounds = arguments
    return _conv_outputs(x, weight, bounds)


library.CONV["triton"] = library.Kernels(run_conv, _outputs_of_conv, run_conv_backward)
