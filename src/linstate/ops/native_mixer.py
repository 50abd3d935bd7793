"""A mixer between its projections in one call: one token natively, and on a GPU one or many (``ops/triton/mixer.py``).

The torch path of a mixer is the definition; ``csrc/mixer.hpp`` has the same equations in one pass, in float32 from the
projections to the output. A mixer describes itself once, as a :class:`Plan`, asks :func:`serves`, and calls :func:`step`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from linstate.ops import dispatch, native
from linstate.ops.checks import check_cu_seqlens
from linstate.ops.native_program import note_mixer
from linstate.ops.native_tensors import address, wide
from linstate.ops.triton import runtime

_UPDATES = ("linear_attention", "delta_rule")
_DECAYS = ("none", "head", "channel", "sigmoid")
_GATES = ("none", "silu", "sigmoid")


@dataclass(frozen=True)
class Plan:
    """What a mixer does between its projections; what is not named is left out.

    Attributes:
        recurrence: "linear_attention" or "delta_rule". hk, hv, k, v: its sizes.
        q_at, k_at, v_at: where q, k and v begin among the channels of the mixed projection.
        conv: (first channel, channels, taps) of a short convolution with SiLU.
        unit_eps: q and k to unit length (``features.l2_norm``) with this eps.
        scale: factor on q. beta_scale: factor on sigmoid(beta).
        decay: how the log decay comes from the raw steps: "head" or "channel" for ``-exp(rate) softplus(step + bias)``,
            "sigmoid" for ``logsigmoid(step) / divisor`` per channel.
        limits: of the softplus, per head. stepped_values: v times the head's step.
        group_norm: the rms is over the heads of one key head, with a weight for each channel; else over one head.
        gate: of z on the output; gate_first: before the norm.
    """

    recurrence: Literal["linear_attention", "delta_rule"]
    hk: int
    hv: int
    k: int
    v: int
    q_at: int
    k_at: int
    v_at: int
    scale: float
    norm_eps: float
    conv: tuple[int, int, int] = (0, 0, 0)
    unit_eps: float | None = None
    beta_scale: float = 1.0
    decay: str = "none"
    divisor: float = 1.0
    limits: tuple[float, float] = (0.0, float("inf"))
    stepped_values: bool = False
    group_norm: bool = False
    gate: str = "none"
    gate_first: bool = False

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """As ``csrc/bind_token.cpp`` reads them."""
        update, decay, gate = (
            names.index(name)
            for names, name in (
                (_UPDATES, self.recurrence),
                (_DECAYS, self.decay),
                (_GATES, self.gate),
            )
        )
        flags = (int(self.stepped_values), int(self.group_norm), int(self.gate_first))
        shape = (self.hk, self.hv, self.k, self.v)
        return *shape, update, self.q_at, self.k_at, self.v_at, *self.conv, decay, *flags, gate

    @cached_property
    def numbers(self) -> tuple[float, ...]:
        """As ``csrc/bind_token.cpp`` reads them."""
        unit = -1.0 if self.unit_eps is None else self.unit_eps
        return unit, self.scale, self.beta_scale, self.divisor, *self.limits, self.norm_eps


def serves(
    plan: Plan, mixer: nn.Module, projected: Tensor, matrix: Tensor | None, cu_seqlens: Tensor | None
) -> bool:
    """Whether :func:`step` takes this call: no gradient, and the backend table gives the recurrence to ``native`` (one token) or ``triton``."""
    on_gpu = _on_gpu(projected)
    if not on_gpu and (native.reason or cu_seqlens is not None or projected.shape[1] != 1):
        return False
    if type(projected) is not Tensor or torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() and (
        projected.requires_grad
        or (matrix is not None and matrix.requires_grad)
        or any(p.requires_grad for p in mixer.parameters())
    ):
        return False
    if on_gpu:
        from linstate.ops.triton import mixer as on_device

        if on_device.refuses(plan, projected, matrix, *mixer.parameters()) is not None:
            return False
        form = "step" if projected.shape[1] == 1 and cu_seqlens is None else "chunked"
        sizes = {"k": projected[..., : plan.k], "v": projected[..., : plan.v]}
        given = {"tokens": projected.shape[1], **sizes, "initial_state": matrix, "asked": "auto"}
        return dispatch.choose(plan.recurrence, form, "auto", given).backend == "triton"
    call = {"tokens": 1, "v": projected, "initial_state": matrix}
    return dispatch.choose(plan.recurrence, "step", "auto", call).backend == "native"


def _on_gpu(mixed: Tensor) -> bool:
    return not mixed.is_cpu or (runtime.interpreter_serves and runtime.interpreted())


def _row(t: Tensor | None) -> Tensor | None:
    """A tensor ``[B, 1, D]`` or a weight as the kernel reads it: float32 or bfloat16, without gaps but between rows."""
    if t is None:
        return None
    if t.dtype is not torch.float32 and t.dtype is not torch.bfloat16:
        t = t.float()
    return t if t.is_contiguous() or (t.dim() == 3 and t.stride(2) == 1) else t.contiguous()


def step(
    plan: Plan,
    mixed: Tensor,
    matrix: Tensor | None,
    tail: Tensor | None = None,
    *,
    norm: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    beta: Tensor | None = None,
    step: Tensor | None = None,
    rate: Tensor | None = None,
    step_bias: Tensor | None = None,
    skip: Tensor | None = None,
    z: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output ``[B, T, Hv V]`` before the last projection, the matrix state and the convolution's state after it.

    Args:
        mixed: ``[B, T, D]``, among whose channels are q, k and v. matrix, tail: the states before, or None.
        norm: weight of the output norm. weight, bias: of the convolution.
        beta: before its sigmoid. step, rate, step_bias: of the decay. skip: ``[Hv]``. z: before its activation.
    """
    assert norm is not None, "a mixer without the weight of an output norm has no plan"
    if _on_gpu(mixed):
        from linstate.ops.triton import mixer as on_device

        operands = on_device.Operands(weight, bias, beta, step, rate, step_bias, skip, norm, z)
        if mixed.shape[1] == 1 and cu_seqlens is None:
            return on_device.step(plan, mixed, matrix, tail, operands)
        bounds = None
        if cu_seqlens is not None:
            bounds = check_cu_seqlens(plan.recurrence, cu_seqlens, mixed.shape[0], mixed.shape[1])
        return on_device.prefill(plan, mixed, matrix, tail, operands, bounds)
    import linstate._native as _native

    rows = mixed.shape[0]
    y = torch.empty((rows, 1, plan.hv * plan.v), dtype=mixed.dtype)
    after = torch.empty((rows, plan.hv, plan.k, plan.v), dtype=torch.float32)
    tail_after = torch.empty((rows, max(0, plan.conv[2] - 1), plan.conv[1]), dtype=torch.float32)
    # Held by name: an address keeps nothing alive.
    tensors = [_row(t) for t in (mixed, weight, bias, beta, step, rate, step_bias, skip, norm, z)]
    matrix, tail = wide(matrix), wide(tail)
    bfloat16 = torch.bfloat16
    call = (
        plan.sizes,
        plan.numbers,
        rows,
        tuple([None if t is None else (t.data_ptr(), t.stride(0), t.dtype is bfloat16) for t in tensors]),
    )
    out = (y.data_ptr(), plan.hv * plan.v, y.dtype is bfloat16)
    tail_at = tail_after if plan.conv[2] > 1 else None
    _native.mixer(
        *call,
        address(tail),
        tail_after.data_ptr(),
        address(matrix),
        after.data_ptr(),
        out,
        torch.get_num_threads(),
    )
    note_mixer((*call, out), (tail, tail_at, matrix, after), *tensors, y)
    return y, after, tail_after
