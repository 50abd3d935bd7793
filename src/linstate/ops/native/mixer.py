"""A mixer between its projections: one token natively in one call, many in four (``ops/native/block.py``); on a GPU one or many (``ops/triton/mixer.py``).

The torch path of a mixer is the definition; ``csrc/mixer.hpp`` has the same equations in one pass, in float32 from the
projections to the output. A mixer describes itself once, as a :class:`Plan`, asks :func:`serves`, and calls :func:`step`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from linstate.errors import ArgumentError
from linstate.ops import dispatch, native
from linstate.ops.checks import check_cu_seqlens
from linstate.ops.native import block as native_block
from linstate.ops.native.program import note_state
from linstate.ops.native.tensors import address, state_of
from linstate.ops.triton import runtime
from linstate.ops.triton.runtime import LARGEST
from linstate.ops.triton.table import NORMED

_UPDATES = ("linear_attention", "delta_rule")
_DECAYS = ("none", "head", "channel", "sigmoid", "fixed", "exponential")
_NORMS = ("none", "head", "group", "centred")
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
        elu_plus_one: of q and k. rotary_base: q and k turn by the token's position (``parts.rotate``); None: they do not.
        decay: how the log decay comes from the raw steps: "head" or "channel" for ``-exp(rate) softplus(step + bias)``,
            "sigmoid" for ``logsigmoid(step) / divisor`` per channel, "fixed" for the head's rate, "exponential" for
            ``-exp(step + bias)`` per channel.
        limits: of the softplus, per head. stepped_values: v times the head's step.
        normaliser_eps: the state has one more column, of the sum of keys, by whose answer plus this all others are divided.
        norm: "head" or "group" for the rms over one head or over the heads of one key head, with a weight for each channel
            of the group; "centred" for mean and variance over one head, with a weight and a bias for each channel.
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
    norm_eps: float = 0.0
    conv: tuple[int, int, int] = (0, 0, 0)
    unit_eps: float | None = None
    beta_scale: float = 1.0
    decay: str = "none"
    divisor: float = 1.0
    limits: tuple[float, float] = (0.0, float("inf"))
    stepped_values: bool = False
    elu_plus_one: bool = False
    rotary_base: float | None = None
    normaliser_eps: float | None = None
    norm: str = "head"
    gate: str = "none"
    gate_first: bool = False

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """As ``csrc/bind_token.cpp`` reads them."""
        update, decay, norm, gate = (
            names.index(name)
            for names, name in (
                (_UPDATES, self.recurrence),
                (_DECAYS, self.decay),
                (_NORMS, self.norm),
                (_GATES, self.gate),
            )
        )
        flags = (int(self.stepped_values), int(self.elu_plus_one), int(self.gate_first))
        shape = (self.hk, self.hv, self.k, self.v)
        return *shape, update, self.q_at, self.k_at, self.v_at, *self.conv, decay, *flags, norm, gate

    @cached_property
    def numbers(self) -> tuple[float, ...]:
        """As ``csrc/bind_token.cpp`` reads them."""
        unit = -1.0 if self.unit_eps is None else self.unit_eps
        normaliser = -1.0 if self.normaliser_eps is None else self.normaliser_eps
        factors = (unit, self.scale, self.beta_scale, self.divisor)
        return *factors, *self.limits, self.norm_eps, normaliser, self.rotary_base or 0.0

    @property
    def columns(self) -> int:
        """Of the state."""
        return self.v if self.normaliser_eps is None else self.v + 1

    @cached_property
    def behind_conv(self) -> Plan:
        """The plan of what the convolution makes of its channels."""
        at = self.conv[0]
        return replace(self, conv=(0, 0, 0), q_at=self.q_at - at, k_at=self.k_at - at, v_at=self.v_at - at)

    @cached_property
    def of_many(self) -> bool:
        """Whether many tokens can be taken at once: features, rotations and normalisers are not made in passing."""
        plain = not self.elu_plus_one and self.rotary_base is None and self.decay != "fixed"
        fits = max(self.k, self.v) <= LARGEST and (
            self.norm != "group" or self.hv * self.v // self.hk <= NORMED
        )
        return plain and fits and self.norm != "none"


def serves(
    recurrence: str,
    mixer: nn.Module,
    projected: Tensor,
    matrix: Tensor | None,
    cu_seqlens: Tensor | None,
    many: bool = False,
) -> bool:
    """Whether a step takes this call: no gradient, and the backend table gives the recurrence to ``native`` or ``triton``.

    One token a row; also many, and packed ones, where ``many`` says that the mixer can do that (:attr:`Plan.of_many`).
    """
    one = cu_seqlens is None and projected.shape[1] == 1
    device = on_gpu(projected)
    if (native.reason and not device) or not (one or (many and projected.shape[1] > 0)):
        return False
    if type(projected) is not Tensor or torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() and (
        projected.requires_grad
        or (matrix is not None and matrix.requires_grad)
        or any(p.requires_grad for p in mixer.parameters())
    ):
        return False
    call: dispatch.Call = {"tokens": projected.shape[1], "v": projected, "initial_state": matrix}
    form = "step" if one else "chunked"
    call |= {"k": projected[..., :1], "v": projected[..., :1], "asked": "auto"}  # of sizes it has been asked
    if not device:
        return dispatch.choose(recurrence, form, "auto", call).backend == "native"
    from linstate.ops.triton import mixer as programs

    if programs.refuses(projected, matrix, *mixer.parameters()):
        return False
    return dispatch.choose(recurrence, form, "auto", call).backend == "triton"


def on_gpu(t: Tensor) -> bool:
    """Whether Triton's programs serve a tensor: elsewhere than on the CPU, or there in tests of them."""
    return not t.is_cpu or (runtime.interpreter_serves and runtime.interpreted())


def row(t: Tensor | None) -> Tensor | None:
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
    norm: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    beta: Tensor | None = None,
    step: Tensor | None = None,
    rate: Tensor | None = None,
    step_bias: Tensor | None = None,
    skip: Tensor | None = None,
    bonus: Tensor | None = None,
    norm_bias: Tensor | None = None,
    z: Tensor | None = None,
    key: Tensor | None = None,
    value: Tensor | None = None,
    position: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output ``[B, T, Hv V]`` before the last projection, the matrix state and the convolution's state after it.

    Raises ArgumentError for states of other shapes; weights and projections are the mixer's own, which made them to fit.

    Args:
        mixed: ``[B, T, D]``, among whose channels are q, k and v. key, value: ``[B, T, Hk K]`` and ``[B, T, Hv V]`` where they
            are not. matrix, tail: the states before, or None.
        norm, norm_bias: of the output norm. weight, bias: of the convolution.
        beta: before its sigmoid. step, rate, step_bias: of the decay. skip: ``[Hv]``. bonus: ``[Hv, K]``, with which the
            newest token is read, before it decays anything. z: before its activation.
        position: int64 ``[B, 1]``, what ``rotary_base`` turns by. cu_seqlens: of packed sequences, where :func:`serves` takes them.
    """
    assert (norm is None) == (plan.norm == "none"), "a plan's norm needs its weight"
    if on_gpu(mixed):
        from linstate.ops.triton import mixer as programs

        operands = programs.Operands(
            weight=weight,
            bias=bias,
            beta=beta,
            step=step,
            rate=rate,
            step_bias=step_bias,
            skip=skip,
            bonus=bonus,
            norm=norm,
            norm_bias=norm_bias,
            z=z,
            key=key,
            value=value,
            position=position,
        )
        if mixed.shape[1] == 1 and cu_seqlens is None:
            return programs.step(plan, mixed, matrix, tail, operands)
        bounds = None
        if cu_seqlens is not None:
            bounds = check_cu_seqlens(plan.recurrence, cu_seqlens, mixed.shape[0], mixed.shape[1])
        return programs.prefill(plan, mixed, matrix, tail, operands, bounds)
    # Held by name: an address keeps nothing alive.
    given = (mixed, weight, bias, beta, step, rate, step_bias, skip, bonus, norm, norm_bias, z, key, value)
    if mixed.shape[1] != 1 or cu_seqlens is not None:
        bounds = (
            None if cu_seqlens is None else check_cu_seqlens(plan.recurrence, cu_seqlens, *mixed.shape[:2])
        )
        return native_block.prefill(plan, matrix, tail, given, bounds)
    import linstate._native as _native

    rows = mixed.shape[0]
    y = torch.empty((rows, 1, plan.hv * plan.v), dtype=mixed.dtype)
    after = torch.empty((rows, plan.hv, plan.k, plan.columns), dtype=torch.float32)
    tail_after = torch.empty((rows, max(0, plan.conv[2] - 1), plan.conv[1]), dtype=torch.float32)
    tensors = [row(t) for t in given]
    if position is not None and (position.shape != (rows, 1) or position.dtype is not torch.int64):
        raise ArgumentError(
            f"position must be int64 [{rows}, 1], one for each row, got {position.dtype} {list(position.shape)}"
        )
    tensors.append(position)
    matrix = state_of("matrix", matrix, tuple(after.shape))
    tail = state_of("convolution", tail, tuple(tail_after.shape))
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
    note_state("mixer", (*call, out), (tail, tail_at, matrix, after), *tensors, y)
    return y, after, tail_after
