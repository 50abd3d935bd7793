"""A fused mixer on a CPU: one token in one call, many in four (``ops/native/block.py``).

``csrc/mixer.hpp`` has the equations of the definition (``ops/fused/definition.py``) in one pass, in float32 from the projections to
the output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linstate.errors import ArgumentError
from linstate.ops import native
from linstate.ops.dispatch import Call, register
from linstate.ops.fused.plan import Operands, Plan
from linstate.ops.native import lib
from linstate.ops.native.plan import carried_out
from linstate.ops.native.program import note_state
from linstate.ops.native.tensors import DTYPES, rows
from linstate.ops.tensors import plain, state_of


def refuses(call: Call) -> str | None:
    """Why these kernels do not take a call, or None."""
    if native.reason:
        return native.reason
    mixed, matrix, plan, of = call["mixed"], call["matrix"], call["plan"], call["operands"]
    if not mixed.is_cpu or mixed.dtype not in DTYPES:
        return f"mixed is {mixed.dtype} on {mixed.device}"
    if plan.norm == "none" and of.z is not None:
        return "an output gate comes with a norm"
    if (mixed.shape[1] != 1 or "bounds" in call) and not (plan.of_many and mixed.shape[1]):
        return "many tokens of features, rotations, normalisers and fixed decays are not taken at once"
    if not plain(mixed, matrix, *of.given())[0]:
        return "a gradient, torch.compile or a tensor of another kind is asked for"
    if matrix is not None and matrix.dtype not in DTYPES:
        return f"matrix is {matrix.dtype}, not float32 or bfloat16"
    return None


@register("fused", "step", "native", refuses=refuses)
def step(
    plan: Plan,
    mixed: Tensor,
    matrix: Tensor | None,
    tail: Tensor | None,
    of: Operands,
    cu_seqlens: Tensor | None,
    bounds: list[int] | None,
    norm: object,
) -> tuple[Tensor, Tensor, Tensor]:
    """One token of every row; arguments as in :func:`linstate.ops.fused.definition.run`. Raises ArgumentError for other states."""
    count = mixed.shape[0]
    y = torch.empty((count, 1, plan.hv * plan.v), dtype=mixed.dtype)
    after = torch.empty((count, plan.hv, plan.k, plan.columns), dtype=torch.float32)
    tail_after = torch.empty((count, max(0, plan.conv[2] - 1), plan.conv[1]), dtype=torch.float32)
    position = of.position
    if position is not None and (position.shape != (count, 1) or position.dtype is not torch.int64):
        raise ArgumentError(
            f"position must be int64 [{count}, 1], one for each row, got {position.dtype} {list(position.shape)}"
        )
    matrix = state_of("matrix", matrix, tuple(after.shape))
    tail = state_of("convolution", tail, tuple(tail_after.shape))
    given = (mixed, of.weight, of.bias, of.beta, of.step, of.rate, of.step_bias, of.skip, of.bonus)
    tensors = [rows(t) for t in (*given, of.norm, of.norm_bias, of.z, of.key, of.value)]
    call: Any = (carried_out(plan), *tensors, position, y)
    tail_at = tail_after if plan.conv[2] > 1 else None
    arguments: Any = (*call, (tail, matrix), (tail_at, after), torch.get_num_threads())
    lib.mixer(*arguments)
    note_state("mixer", call, (tail, tail_at, matrix, after))
    return y, after, tail_after
