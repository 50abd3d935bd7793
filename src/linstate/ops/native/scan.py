"""The native elementwise scan and short convolution: from checked tensors to addresses, and the gradient.

``csrc/scan.hpp`` and ``csrc/conv.hpp`` have the kernels. They walk token by token, so one kernel serves as chunked form
and as step, and no bit depends on where a sequence was cut. Inputs may have any strides but the last, which must be dense.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linstate.ops.dispatch import TABLE, register
from linstate.ops.native.gradient import SEGMENT, by_segments
from linstate.ops.native.tensors import address, complete, kept_shape, place, unfit
from linstate.ops.tensors import dense, keeps, plain, wide

# ------------------------------------------------------------------------------------------ the elementwise scan


@register("selective_scan", "step", "native", refuses=unfit)
@register("selective_scan", "chunked", "native", refuses=unfit, packs=True, keeps=keeps)
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
    if snapshots is not None:
        o, after, kept = _scan_outputs(q, v, bounds, snapshots, final=True)
        _fill_scan(*tensors, scale, bounds, snapshots, o, after, kept)
        return o, complete(kept, after, v.shape[1], bounds, snapshots)
    direct, learning = plain(*tensors)
    call = run_scan if direct else torch.ops.linstate.selective_scan
    o, after, _ = call(*tensors, scale, bounds, SEGMENT if learning else 0)
    return o, after


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
    """The kernel: o, the state behind the last token, and ``[rows, Hv, T // every, K, V]`` the states every so many tokens."""
    o, after, kept = _scan_outputs(q, v, bounds, every)
    _fill_scan(q, k, v, g, A, initial_state, scale, bounds, every, o, after, kept)
    return o, after, kept


def _fill_scan(
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor,
    g: Tensor,
    A: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    bounds: list[int] | None,
    every: int,
    o: Tensor,
    after: Tensor,
    kept: Tensor,
) -> None:
    """Run the kernel into o, after and kept, made by :func:`_scan_outputs`."""
    import linstate._native as _native

    _, tokens, heads, v_dim = v.shape
    hk, k_dim = (1, 1) if q is None else q.shape[2:]
    # Held by name: an address keeps nothing alive.
    sequences = [dense(t) for t in (q, k, v, g)]
    edges = None if bounds is None else torch.tensor(bounds)
    rates, before = wide(A), wide(initial_state)
    _native.scan(
        (after.shape[0], tokens, hk, heads, heads, k_dim, v_dim),
        tuple(map(place, sequences)),
        address(rates),
        scale,
        address(edges),
        address(before),
        after.data_ptr(),
        place(o),
        address(kept) if kept.numel() else None,
        every,
        kept.shape[2],
        torch.get_num_threads(),
    )


def _scan_outputs(
    q: Tensor | None, v: Tensor, bounds: list[int] | None, every: int, *, final: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    rows, count = kept_shape(v, bounds, every, final=final)
    heads, v_dim = v.shape[2:]
    k_dim = 1 if q is None else q.shape[-1]
    after = v.new_empty((rows, heads, k_dim, v_dim), dtype=torch.float32)
    kept = v.new_empty((rows, heads, count, k_dim, v_dim), dtype=torch.float32)
    return v.new_empty(v.shape), after, kept


_scan = torch.library.custom_op("linstate::selective_scan", run_scan, mutates_args=())


@_scan.register_fake
def _(
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
    return _scan_outputs(q, v, bounds, every)


def _remember_scan(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale, ctx.bounds, ctx.every = inputs
    ctx.save_for_backward(*tensors, output[2])


def _scan_backward(ctx: Any, grad_o: Tensor, grad_state: Tensor, grad_kept: Tensor) -> tuple[Any, ...]:
    q, k, v, g, A, before, kept = ctx.saved_tensors
    grads, fixed, start = by_segments(
        TABLE["selective_scan", "chunked", "torch"].run,
        {"q": q, "k": k, "v": v, "g": g},
        {"A": A},
        {"scale": ctx.scale},
        before,
        kept,
        grad_o,
        grad_state,
        ctx.bounds,
        ctx.every,
    )
    return *(grads.get(name) for name in "qkvg"), fixed.get("A"), start, None, None, None


_scan.register_autograd(_scan_backward, setup_context=_remember_scan)


# ---------------------------------------------------------------------------------------- the short convolution


@register("causal_conv1d", "step", "native", refuses=unfit)
@register("causal_conv1d", "chunked", "native", refuses=unfit, packs=True)
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
    call = run_conv if direct else torch.ops.linstate.causal_conv1d
    y, after = call(*tensors, activation, bounds)
    return y, after


def run_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    activation: str | None,
    bounds: list[int] | None,
) -> tuple[Tensor, Tensor]:
    """The kernel: y and the last W - 1 inputs."""
    import linstate._native as _native

    _, tokens, channels = x.shape
    y, after = _conv_outputs(x, weight, bounds)
    x = x if x.stride(2) == 1 else x.contiguous()
    weight, before = weight.contiguous(), wide(initial_state)
    bias = None if bias is None else bias.contiguous()
    edges = None if bounds is None else torch.tensor(bounds)
    strides, y_strides = x.stride(), y.stride()
    _native.conv(
        (after.shape[0], tokens, channels, weight.shape[1]),
        (x.data_ptr(), strides[0], strides[1], 0, x.dtype is torch.bfloat16),
        (weight.data_ptr(), 0, 0, 0, weight.dtype is torch.bfloat16),
        None if bias is None else (bias.data_ptr(), 0, 0, 0, bias.dtype is torch.bfloat16),
        activation == "silu",
        address(edges),
        address(before),
        after.data_ptr(),
        (y.data_ptr(), y_strides[0], y_strides[1], 0, y.dtype is torch.bfloat16),
        torch.get_num_threads(),
    )
    return y, after


def _conv_outputs(x: Tensor, weight: Tensor, bounds: list[int] | None) -> tuple[Tensor, Tensor]:
    rows = x.shape[0] if bounds is None else len(bounds) - 1
    after = x.new_empty((rows, weight.shape[1] - 1, x.shape[2]), dtype=torch.float32)
    return x.new_empty(x.shape), after


_conv = torch.library.custom_op("linstate::causal_conv1d", run_conv, mutates_args=())


@_conv.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    activation: str | None,
    bounds: list[int] | None,
) -> tuple[Tensor, Tensor]:
    return _conv_outputs(x, weight, bounds)


def _remember_conv(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.activation, ctx.bounds = inputs
    ctx.save_for_backward(*tensors)


def _conv_backward(ctx: Any, grad_y: Tensor, grad_state: Tensor) -> tuple[Any, ...]:
    x, weight, bias, before = ctx.saved_tensors
    torch_form = TABLE["causal_conv1d", "chunked", "torch"].run
    bounds = ctx.bounds or [0, x.shape[1]]
    start = torch.zeros_like(grad_state) if before is None else before
    x, weight, start = (t.detach().requires_grad_() for t in (x, weight, start))
    bias = None if bias is None else bias.detach().requires_grad_()
    pieces = []
    with torch.enable_grad():
        for row, (first, last) in enumerate(zip(bounds, bounds[1:], strict=False)):
            entry = slice(row, row + 1) if ctx.bounds else slice(None)
            pieces.append(torch_form(x[:, first:last], weight, bias, ctx.activation, start[entry]))
        y, after = (torch.cat(parts, dim=1 - i) for i, parts in enumerate(zip(*pieces, strict=True)))
    wanted = [x, weight, start] if bias is None else [x, weight, start, bias]
    found = torch.autograd.grad((y, after), wanted, (grad_y, grad_state), allow_unused=True)
    of_bias = None if bias is None else found[3]
    return found[0], found[1], of_bias, None if before is None else found[2], None, None


_conv.register_autograd(_conv_backward, setup_context=_remember_conv)
