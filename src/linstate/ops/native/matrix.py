"""The native chunked recurrences on a matrix state, and their gradient.

``csrc/matrix.hpp`` has the kernels. They read inputs of any strides but the last, which must be dense, and write tensors
made here, so nothing overlaps. Forward is native; backward runs the chunked torch form again, a segment at a time from
the states that forward kept, so that memory is linear in T.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linstate.ops import library
from linstate.ops.dispatch import TABLE, Call, register
from linstate.ops.native import lib
from linstate.ops.native.gradient import SEGMENT, by_segments
from linstate.ops.native.tensors import complete, edges, kept_shape, unfit
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
    recurrence: str,
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
        o, after, kept = _empty(v, k.shape[-1], bounds, snapshots, final=True)
        _fill(recurrence, *tensors, scale, bounds, snapshots, o, after, kept)
        return o, complete(kept, after, v.shape[1], bounds, snapshots)
    direct, learning = plain(*tensors)
    if direct:
        o, after, _ = run(recurrence, *tensors, scale, bounds, 0)
    else:
        o, after, _ = library.matrix(
            "native", recurrence, *tensors, scale, bounds, SEGMENT if learning else 0
        )
    return o, after


def run(
    recurrence: str,
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
    """The kernel: o, the state after the last token, and ``[rows, Hv, T // every, K, V]`` the states every so many tokens."""
    o, after, kept = _empty(v, k.shape[-1], bounds, every)
    _fill(recurrence, q, k, v, a, b, beta, g, bonus, initial_state, scale, bounds, every, o, after, kept)
    return o, after, kept


def _fill(
    recurrence: str,
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
    """Run the kernel into o, after and kept, made by :func:`_empty`."""
    lib.matrix(
        getattr(lib.Recurrence, recurrence),
        *(dense(q), dense(k), dense(v), dense(a), dense(b), beta),  # type: ignore[arg-type]
        dense(g) if g is not None and g.dim() == 4 else g,
        wide(bonus),
        scale,
        edges(bounds),
        wide(initial_state),
        after,
        o,
        kept if kept.numel() else None,
        every,
        torch.get_num_threads(),
    )


def _empty(
    v: Tensor, k_dim: int, bounds: list[int] | None, every: int, *, final: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    rows, count = kept_shape(v, bounds, every, final=final)
    heads, v_dim = v.shape[2:]
    after = v.new_empty((rows, heads, k_dim, v_dim), dtype=torch.float32)
    kept = v.new_empty((rows, heads, count, k_dim, v_dim), dtype=torch.float32)
    return v.new_empty(v.shape), after, kept


def _outputs(recurrence: str, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Of :func:`run`."""
    _, k, v, *_, bounds, every = arguments
    return _empty(v, k.shape[-1], bounds, every)


_SEQUENCES = ("q", "k", "v", "a", "b", "beta", "g")
_TAKES = {
    "linear_attention": ("q", "k", "v", "g"),
    "delta_rule": ("q", "k", "v", "beta", "g"),
    "dplr": ("q", "k", "v", "a", "b", "g"),
}


def backward(recurrence: str, *arguments: Any) -> list[Tensor]:
    """See :func:`linstate.ops.library.matrix_backward`."""
    *tensors, bonus, before, kept, grad_o, grad_after, scale, bounds, every = arguments
    grads, fixed, start = by_segments(
        TABLE[recurrence, "chunked", "torch"].run,
        {name: t for name, t in zip(_SEQUENCES, tensors, strict=True) if name in _TAKES[recurrence]},
        {"bonus": bonus} if recurrence == "linear_attention" else {},
        {"scale": scale},
        before,
        kept,
        grad_o,
        grad_after,
        bounds,
        every,
    )
    found = [*(grads.get(name) for name in _SEQUENCES), fixed.get("bonus"), start]
    return [grad_o.new_empty(0) if t is None else t for t in found]


library.MATRIX["native"] = library.Kernels(run, _outputs, backward, traced=True)


def register_chunked(recurrence: str) -> None:
    """Enter the kernel of one of ``KINDS`` into the backend table."""

    @register(recurrence, "chunked", "native", refuses=refuses, packs=True, keeps=keeps)
    def native_chunked(**arguments: Any) -> tuple[Tensor, Tensor]:
        return chunked(recurrence, **arguments)


for _recurrence in KINDS:
    register_chunked(_recurrence)
