"""The native step of the recurrences on a matrix state: one token, the state read once and written once.

``csrc/step.hpp`` has the kernels. A step is worth tens of microseconds, so little stands between the op and the kernel:
no ``torch.library``; where a gradient, a compiler or a fake tensor needs it, the torch form serves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linstate.ops import native
from linstate.ops.dispatch import Call, register
from linstate.ops.native import lib
from linstate.ops.native.matrix import KINDS
from linstate.ops.native.tensors import unfit
from linstate.ops.tensors import dense, plain, wide

_RECURRENCES = {name: getattr(lib.Recurrence, name) for name in KINDS if native.available}


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
    return _step("linear_attention", q, k, v, None, None, None, g, wide(bonus), scale, initial_state)


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
    return _step("delta_rule", q, k, v, None, None, beta, g, None, scale, initial_state)


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
    return _step("dplr", q, k, v, a, b, None, g, None, scale, initial_state)


def _step(
    recurrence: str,
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
    o = torch.empty(v.shape, dtype=v.dtype)
    after = torch.empty((v.shape[0], v.shape[2], k.shape[3], v.shape[3]), dtype=torch.float32)
    lib.step(
        _RECURRENCES[recurrence],
        *(dense(q), dense(k), dense(v), dense(a), dense(b), beta),  # type: ignore[arg-type]
        dense(g) if g is not None and g.dim() == 4 else g,
        bonus,
        scale,
        wide(initial_state),
        after,
        o,
        torch.get_num_threads(),
    )
    return o, after
