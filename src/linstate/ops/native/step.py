"""The native step of the recurrences on a matrix state: one token, the state read once and written once.

``csrc/step.hpp`` has the kernels. A step is worth tens of microseconds, so little stands between the op and the kernel:
no ``torch.library``; where a gradient, a compiler or a fake tensor needs it, the torch form serves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linstate.ops.dispatch import Call, register
from linstate.ops.native.tensors import address, place, unfit
from linstate.ops.tensors import dense, plain, wide


def refuses(call: Call) -> str | None:
    """Why these kernels do not take a call, or None."""
    why = unfit(call)
    if why is None and not plain(*(t for t in call.values() if isinstance(t, Tensor)))[0]:
        why = "a gradient, torch.compile or a tensor of another kind is asked for"
    return why


@register("linear_attention", "step", "native", refuses=refuses)
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
    return _step(0, q, k, v, None, None, None, g, wide(bonus), scale, initial_state)


@register("delta_rule", "step", "native", refuses=refuses)
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


@register("dplr", "step", "native", refuses=refuses)
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
    import linstate._native as _native

    batch, _, heads, v_dim = v.shape
    _, _, hk, k_dim = k.shape
    o = torch.empty(v.shape, dtype=v.dtype)
    after = torch.empty((batch, heads, k_dim, v_dim), dtype=torch.float32)
    before = wide(initial_state)
    # Held by name: an address keeps nothing alive. beta and g per head have any strides.
    q, k, v, a, b = dense(q), dense(k), dense(v), dense(a), dense(b)  # type: ignore[assignment]
    g = dense(g) if g is not None and g.dim() == 4 else g
    _native.step(
        kind,
        (batch, 1, hk, heads, hk if g is None else g.shape[2], k_dim, v_dim),
        (place(q), place(k), place(v), place(a), place(b), place(beta), place(g)),
        0 if g is None else g.dim() - 2,  # of T and head, or of the channel too
        scale,
        address(bonus),
        address(before),
        after.data_ptr(),
        place(o),
        torch.get_num_threads(),
    )
    return o, after
