"""The native elementwise scan and short convolution: and their gradients.

``csrc/scan.hpp`` and ``csrc/conv.hpp`` have the kernels. They walk token by token, so one kernel serves as chunked form
and as step, and no bit depends on where a sequence was cut. Inputs may have any strides but the last, which must be dense.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linstate.ops import library
from linstate.ops.dispatch import TABLE, register
from linstate.ops.native import lib
from linstate.ops.native.gradient import SEGMENT, by_segments
from linstate.ops.native.tensors import complete, edges, kept_shape, unfit
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
    if direct:
        o, after, _ = run_scan(*tensors, scale, bounds, 0)
    else:
        o, after, _ = library.selective_scan("native", *tensors, scale, bounds, SEGMENT if learning else 0)
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
    lib.scan(
        *(dense(q), dense(k), dense(v), dense(g)),  # type: ignore[arg-type]
        wide(A),
        scale,
        edges(bounds),
        wide(initial_state),
        after,
        o,
        kept if kept.numel() else None,
        every,
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


def _outputs(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Of :func:`run_scan`."""
    q, _, v, *_, bounds, every = arguments
    return _scan_outputs(q, v, bounds, every)


def scan_backward(*arguments: Any) -> list[Tensor]:
    """See :func:`linstate.ops.library.selective_scan_backward`."""
    q, k, v, g, A, before, kept, grad_o, grad_after, scale, bounds, every = arguments
    grads, fixed, start = by_segments(
        TABLE["selective_scan", "chunked", "torch"].run,
        {"q": q, "k": k, "v": v, "g": g},
        {"A": A},
        {"scale": scale},
        before,
        kept,
        grad_o,
        grad_after,
        bounds,
        every,
    )
    found = [*(grads.get(name) for name in "qkvg"), fixed.get("A"), start]
    return [grad_o.new_empty(0) if t is None else t for t in found]


library.SCAN["native"] = library.Kernels(run_scan, _outputs, scan_backward, traced=True)


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
    if direct:
        return run_conv(*tensors, activation, bounds)
    y, after = library.causal_conv1d("native", *tensors, activation, bounds)
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
    y, after = _conv_outputs(x, weight, bounds)
    lib.conv(
        x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous(),
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        activation == "silu",
        edges(bounds),
        wide(initial_state),
        after,
        y,
        torch.get_num_threads(),
    )
    return y, after


def _conv_outputs(x: Tensor, weight: Tensor, bounds: list[int] | None) -> tuple[Tensor, Tensor]:
    rows = x.shape[0] if bounds is None else len(bounds) - 1
    after = x.new_empty((rows, weight.shape[1] - 1, x.shape[2]), dtype=torch.float32)
    return x.new_empty(x.shape), after


def _outputs_of_conv(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Of :func:`run_conv`."""
    x, weight, *_, bounds = arguments
    return _conv_outputs(x, weight, bounds)


def conv_backward(*arguments: Any) -> list[Tensor]:
    """See :func:`linstate.ops.library.causal_conv1d_backward`: the torch form again, sequence by sequence."""
    x, weight, bias, before, grad_y, grad_after, activation, packed = arguments
    torch_form = TABLE["causal_conv1d", "chunked", "torch"].run
    bounds = packed or [0, x.shape[1]]
    start = torch.zeros_like(grad_after) if before is None else before
    x, weight, start = (t.detach().requires_grad_() for t in (x, weight, start))
    bias = None if bias is None else bias.detach().requires_grad_()
    pieces = []
    with torch.enable_grad():
        for row, (first, last) in enumerate(zip(bounds, bounds[1:], strict=False)):
            entry = slice(row, row + 1) if packed else slice(None)
            pieces.append(torch_form(x[:, first:last], weight, bias, activation, start[entry]))
        y, after = (torch.cat(parts, dim=1 - i) for i, parts in enumerate(zip(*pieces, strict=True)))
    wanted = [x, weight, start] if bias is None else [x, weight, start, bias]
    found = torch.autograd.grad(
        (y, after), wanted, (grad_y, grad_after), allow_unused=True, materialize_grads=True
    )
    nothing = grad_y.new_empty(0)
    of_bias = nothing if bias is None else found[3]
    return [found[0], found[1], of_bias, nothing.clone() if before is None else found[2]]


library.CONV["native"] = library.Kernels(run_conv, _outputs_of_conv, conv_backward, traced=True)
