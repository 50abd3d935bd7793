"""The native chunked recurrences on a matrix state: from checked tensors to addresses, and the gradient.

``csrc/matrix.hpp`` has the kernels. They read inputs of any strides but the last, which must be dense, and write tensors
made here, so nothing overlaps. Forward is native; backward runs the chunked torch form again, a segment at a time from
the states that forward kept, so that memory is linear in T.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linstate.ops.dispatch import TABLE, Call, register
from linstate.ops.native.gradient import SEGMENT, by_segments
from linstate.ops.native.tensors import address, complete, kept_shape, place, unfit
from linstate.ops.tensors import dense, keeps, plain, wide

LARGEST = 256  # of K and V
CHUNK = 64
KINDS = ("linear_attention", "delta_rule", "dplr")


def refuses(call: Call) -> str | None:
    """Why these kernels do not take a call, or None."""
    if why := unfit(call):
        return why
    if call["k"].shape[-1] > LARGEST or call["v"].shape[-1] > LARGEST:
        return f"K and V go up to {LARGEST}"
    return None


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
    """One of ``KINDS``; arguments as in the op, checked. ``snapshots`` only where :func:`keeps` says so."""
    tensors = (q, k, v, a, b, beta, g, bonus, initial_state)
    if snapshots is not None:
        o, after, kept = _outputs(v, k.shape[-1], bounds, snapshots, final=True)
        _fill(kind, *tensors, scale, bounds, snapshots, o, after, kept)
        return o, complete(kept, after, v.shape[1], bounds, snapshots)
    direct, learning = plain(*tensors)
    if direct:
        o, after, _ = run(kind, *tensors, scale, bounds, 0)
        return o, after
    o, after, _ = torch.ops.linstate.matrix(kind, *tensors, scale, bounds, SEGMENT if learning else 0)
    return o, after


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
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel: o, the state behind the last token, and ``[rows, Hv, T // every, K, V]`` the states every so many tokens."""
    o, after, kept = _outputs(v, k.shape[-1], bounds, every)
    _fill(kind, q, k, v, a, b, beta, g, bonus, initial_state, scale, bounds, every, o, after, kept)
    return o, after, kept


def _fill(
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
    o: Tensor,
    after: Tensor,
    kept: Tensor,
) -> None:
    """Run the kernel into o, after and kept, made by :func:`_outputs`."""
    import linstate._native as _native

    # Held by name: an address keeps nothing alive. beta and g per head have any strides.
    of_head = g is None or g.dim() == 3
    sequences = [*map(dense, (q, k, v, a, b)), beta, g if of_head else dense(g)]
    tokens, hv, v_dim = v.shape[1:]
    hk, k_dim = k.shape[2:]
    edges = None if bounds is None else torch.tensor(bounds)
    before, bonus = wide(initial_state), wide(bonus)
    _native.matrix(
        kind,
        (after.shape[0], tokens, hk, hv, hk if g is None else g.shape[2], k_dim, v_dim),
        tuple(map(place, sequences)),
        0 if g is None else g.dim() - 2,  # of T and head, or of the channel too
        scale,
        address(edges),
        address(bonus),
        address(before),
        after.data_ptr(),
        place(o),
        kept.data_ptr() if kept.numel() else None,
        every,
        kept.shape[2],
        torch.get_num_threads(),
    )


def _outputs(
    v: Tensor, k_dim: int, bounds: list[int] | None, every: int, *, final: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    rows, count = kept_shape(v, bounds, every, final=final)
    heads, v_dim = v.shape[2:]
    after = v.new_empty((rows, heads, k_dim, v_dim), dtype=torch.float32)
    kept = v.new_empty((rows, heads, count, k_dim, v_dim), dtype=torch.float32)
    return v.new_empty(v.shape), after, kept


# For torch.compile, fake tensors and gradients; a plain call does not pay for it.
_matrix = torch.library.custom_op("linstate::matrix", run, mutates_args=())


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
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(v, k.shape[-1], bounds, every)


_SEQUENCES = ("q", "k", "v", "a", "b", "beta", "g")
_TAKES = {
    "linear_attention": ("q", "k", "v", "g"),
    "delta_rule": ("q", "k", "v", "beta", "g"),
    "dplr": ("q", "k", "v", "a", "b", "g"),
}


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.kind, *tensors, ctx.scale, ctx.bounds, ctx.every = inputs
    ctx.save_for_backward(*tensors, output[2])


def _backward(ctx: Any, grad_o: Tensor, grad_state: Tensor, grad_kept: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, bonus, before, kept = ctx.saved_tensors
    recurrence = KINDS[ctx.kind]
    grads, fixed, starts = by_segments(
        TABLE[recurrence, "chunked", "torch"].run,
        {name: t for name, t in zip(_SEQUENCES, tensors, strict=True) if name in _TAKES[recurrence]},
        {"bonus": bonus} if recurrence == "linear_attention" else {},
        {"scale": ctx.scale},
        before,
        kept,
        grad_o,
        grad_state,
        ctx.bounds,
        ctx.every,
    )
    return None, *(grads.get(name) for name in _SEQUENCES), fixed.get("bonus"), starts, None, None, None


_matrix.register_autograd(_backward, setup_context=_remember)


def register_chunked(kind: int) -> None:
    """Enter the kernel of one of ``KINDS`` into the backend table."""

    @register(KINDS[kind], "chunked", "native", refuses=refuses, packs=True, keeps=keeps)
    def native_chunked(**arguments: Any) -> tuple[Tensor, Tensor]:
        return chunked(kind, **arguments)


for _kind in range(len(KINDS)):
    register_chunked(_kind)
