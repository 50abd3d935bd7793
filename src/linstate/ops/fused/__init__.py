"""A fused mixer: everything that stands between a mixer's projections, as one op.

``y, matrix, tail = fused(plan, mixed, operands, matrix=..., tail=...)``: the convolution, the gates, the recurrence, the norm and the output
gate that a :class:`Plan` names. Its definition is composed of the other ops (:mod:`linstate.ops.fused.definition`); kernels do
the same in one pass, in float32 from the projections to the output.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from linstate.errors import ArgumentError
from linstate.ops import dispatch
from linstate.ops.checks import check_cu_seqlens
from linstate.ops.fused import definition as _definition  # noqa: F401  # enters it into the table
from linstate.ops.fused.plan import Operands, Plan

__all__ = ["NAME", "Operands", "Plan", "fused"]

NAME = "fused"
"""In the table of kernels."""


def fused(
    plan: Plan,
    mixed: Tensor,
    operands: Operands,
    *,
    matrix: Tensor | None = None,
    tail: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    norm: Callable[[Tensor], Tensor] | None = None,
    form: str = "auto",
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """What a mixer does between its projections.

    Args:
        mixed: ``[B, T, D]``, as projected, among whose channels are q, k and v.
        matrix: the matrix state before, ``[B, Hv, K, columns]``; None is empty. tail: of the convolution, ``[B, W - 1, channels]``.
        cu_seqlens: as in :func:`linstate.ops.linear_attention`; states are ``[N, ...]`` then.
        norm: the mixer's own output norm, ``[B, T, Hv, V]`` (of groups: ``[B, T, Hv V]``) in and out, for the torch form: a model
            that was packed has a faster one. Default: the plan's.
        form, backend: as there.

    Returns:
        y ``[B, T, Hv V]`` before the last projection, the matrix state and the convolution's state after; without a
        convolution that is empty.

    Raises:
        ArgumentError: a shape does not fit. BackendError: the backend that was asked for refuses the call.
    """
    if mixed.dim() != 3:
        raise ArgumentError(f"fused: mixed must be [B, T, D], got {list(mixed.shape)}")
    call: dispatch.Call = {
        "tokens": mixed.shape[1],
        "asked": backend,
        "plan": plan,
        "operands": operands,
        "mixed": mixed,
        "matrix": matrix,
    }
    bounds = None
    if cu_seqlens is not None:
        bounds = call["bounds"] = check_cu_seqlens(plan.recurrence, cu_seqlens, *mixed.shape[:2])
    run = dispatch.choose(NAME, form, backend, call).run
    found: tuple[Tensor, Tensor, Tensor] = run(plan, mixed, matrix, tail, operands, cu_seqlens, bounds, norm)
    return found
