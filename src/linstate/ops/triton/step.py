"""One token on a GPU: the steps of the recurrences on a matrix state, one launch each, and the same in place for serving.

:func:`step_in_slots` is for a batched server: states of all conversations lie in one tensor, a call names the slot of every row, and
nothing is allocated where the output is given, so that the call can be captured in a CUDA graph and replayed with other slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linstate.errors import ArgumentError, BackendError
from linstate.ops.dispatch import Call, register
from linstate.ops.tensors import dense, plain, wide
from linstate.ops.triton import matrix, table
from linstate.ops.triton.problem import strides
from linstate.ops.triton.runtime import launch


def refuses(call: Call) -> str | None:
    """Why the step does not take a call, or None."""
    why = matrix.refuses(call)
    if why is None and not plain(*(t for t in call.values() if isinstance(t, Tensor)))[0]:
        why = "a gradient, torch.compile or a tensor of another kind is asked for"
    return why


@register("linear_attention", "step", "triton", refuses=refuses)
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    bonus: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See the module; arguments as in :func:`linstate.ops.linear_attention`."""
    return _step(0, q, k, v, None, None, None, g, bonus, scale, initial_state)


@register("delta_rule", "step", "triton", refuses=refuses)
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See the module; arguments as in :func:`linstate.ops.delta_rule`."""
    return _step(1, q, k, v, None, None, beta, g, None, scale, initial_state)


@register("dplr", "step", "triton", refuses=refuses)
def dplr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See the module; arguments as in :func:`linstate.ops.dplr`."""
    return _step(2, q, k, v, a, b, None, g, None, scale, initial_state)


def _step(
    kind: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    beta: Tensor | None,
    g: Tensor | None,
    bonus: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    o = v.new_empty(v.shape)
    after = v.new_empty((v.shape[0], v.shape[2], k.shape[3], v.shape[3]), dtype=torch.float32)
    run(kind, q, k, v, a, b, beta, g, wide(bonus), scale, wide(initial_state), after, o, None)
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
    scale: float,
    before: Tensor | None,
    after: Tensor,
    o: Tensor,
    slots: Tensor | None,
) -> None:
    """One launch. ``o [B, 1, Hv, V]`` without gaps; ``before`` and ``after`` may be one tensor."""
    from linstate.ops.triton.kernels.step import step

    q, k, v, a, b, beta, g = matrix.prepare(q, k, v, a, b, beta, g)
    rows, _, hv, v_dim = v.shape
    hk, k_dim = k.shape[2:]
    config = table.step(k_dim, v_dim)
    steps = [n for t in (q, k, v, a, b, beta, g) for n in strides(t)[::2]]  # of batch and head
    launch(
        step,
        rows * hv * -(-v_dim // config.block),
        *(q, k, v, a, b, beta, g, bonus, o, before, after, slots, *steps, scale),
        HV=hv,
        Q_GROUP=hv // hk,
        G_GROUP=1 if g is None else hv // g.shape[2],
        K=k_dim,
        V=v_dim,
        BK=table.padded(k_dim),
        BV=config.block,
        KIND=kind,
        GATE=0 if g is None else g.dim() - 2,
        BONUS=bonus is not None,
        START=before is not None,
        SLOTS=slots is not None,
        num_warps=config.warps,
    )


def step_in_slots(
    recurrence: str,
    states: Tensor,
    slots: Tensor,
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    beta: Tensor | None = None,
    g: Tensor | None = None,
    bonus: Tensor | None = None,
    scale: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One token for each row of a batch, its state updated in place in a slot: one launch.

    Not the contract of the ops, which mutate nothing: the states are overwritten. No two rows may name the same slot.

    Args:
        recurrence: "linear_attention", "delta_rule" or "dplr".
        states: ``[slots, Hv, K, V]`` float32 without gaps.
        slots: ``[B]`` int32 or int64, the slot of each row; a negative one leaves the row out (its output is zero), so that a graph
            captured for B rows serves fewer.
        q, k, v, a, b, beta, g, bonus, scale: as in the op, T = 1.
        out: where the output goes, ``[B, 1, Hv, V]`` in v's dtype without gaps.

    Returns:
        o ``[B, 1, Hv, V]``.

    Raises:
        ArgumentError: a shape or dtype does not fit. BackendError: Triton does not take these tensors.
    """
    name = "step_in_slots"
    if recurrence not in matrix.KINDS:
        raise ArgumentError(
            f"{name}: recurrence must be one of {', '.join(matrix.KINDS)}, got {recurrence!r}"
        )
    if q.dim() != 4 or k.shape != q.shape or v.dim() != 4 or q.shape[:2] != v.shape[:2] or v.shape[1] != 1:
        raise ArgumentError(
            f"{name}: q and k must be [B, 1, Hk, K] and v [B, 1, Hv, V], got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    batch, _, hv, v_dim = v.shape
    hk, k_dim = k.shape[2:]
    if hk == 0 or hv % hk:
        raise ArgumentError(f"{name}: the heads of v ({hv}) must be a multiple of those of q and k ({hk})")
    if states.dim() != 4 or states.shape[1:] != (hv, k_dim, v_dim) or states.dtype != torch.float32:
        raise ArgumentError(
            f"{name}: states must be float32 [slots, {hv}, {k_dim}, {v_dim}], got {states.dtype} {list(states.shape)}"
        )
    if slots.shape != (batch,) or slots.dtype not in (torch.int32, torch.int64):
        raise ArgumentError(
            f"{name}: slots must be int32 or int64 [{batch}], got {slots.dtype} {list(slots.shape)}"
        )
    o = v.new_empty(v.shape) if out is None else out
    if o.shape != v.shape or o.dtype != v.dtype:
        raise ArgumentError(f"{name}: out must be {v.dtype} {list(v.shape)}, got {o.dtype} {list(o.shape)}")
    if not (states.is_contiguous() and o.is_contiguous() and slots.is_contiguous()):
        raise ArgumentError(f"{name}: states, slots and out must lie without gaps")
    given = {"a": a, "b": b, "beta": beta}
    wanted = {"linear_attention": (), "delta_rule": ("beta",), "dplr": ("a", "b")}[recurrence]
    for argument, tensor in given.items():
        shape = (batch, 1, hv) if argument == "beta" else q.shape
        if (tensor is not None) != (argument in wanted) or (tensor is not None and tensor.shape != shape):
            found = None if tensor is None else list(tensor.shape)
            expected = list(shape) if argument in wanted else None
            raise ArgumentError(f"{name}: {argument} of {recurrence} must be {expected}, got {found}")
    if g is not None and (
        g.dim() not in (3, 4)
        or g.shape[:2] != v.shape[:2]
        or (g.shape[2] != hv if g.dim() == 3 else g.shape[2] not in (hk, hv) or g.shape[3] != k_dim)
    ):
        raise ArgumentError(f"{name}: g must be [B, 1, Hv] or [B, 1, Hv or Hk, K], got {list(g.shape)}")
    if bonus is not None and (recurrence != "linear_attention" or bonus.shape != (hv, k_dim)):
        raise ArgumentError(
            f"{name}: bonus must be [{hv}, {k_dim}], of linear_attention only, got {list(bonus.shape)}"
        )
    call: Call = {"q": q, "k": k, "v": v, **given, "g": g, "bonus": bonus, "states": states}
    if why := refuses(call):
        raise BackendError(f"{name}: triton: {why}")
    for argument, tensor in (("slots", slots), ("states", states), ("out", o)):
        if tensor.device != v.device:
            raise ArgumentError(f"{name}: {argument} is on {tensor.device}, but v is on {v.device}")
    scale = k_dim**-0.5 if scale is None else scale
    kind = matrix.KINDS.index(recurrence)
    run(kind, q, k, v, a, b, beta, g, dense(wide(bonus)), scale, states, states, o, slots)
    return o
