"""What a mixer does between its projections, said once: a plan, and the tensors that one call of it reads.

Nothing here knows a backend. The definition (:mod:`linstate.ops.fused.definition`) says what a plan means; kernels carry it out in one pass.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal

from torch import Tensor

from linstate.ops.tensors import dense

LARGEST = 256
"""Of K and V, for many tokens at once."""
NORMED = 16384
"""Channels of one group of the norm, for many tokens at once."""


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
    def made(self) -> dict[str, Any]:
        """What a backend makes of the plan once, by its name."""
        return {}

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


@dataclass(slots=True)
class Operands:
    """What a plan reads beside ``mixed [B, T, D]``, among whose channels are q, k and v; what is not given is left out.

    Attributes:
        weight, bias: of the convolution.
        beta: before its sigmoid. step, rate, step_bias: of the decay. skip: ``[Hv]``. bonus: ``[Hv, K]``, with which the
            newest token is read, before it decays anything.
        norm, norm_bias: of the output norm. z: before its activation.
        key, value: ``[B, T, Hk K]`` and ``[B, T, Hv V]`` where they are not among the channels of ``mixed``.
        position: int64 ``[B, T]``, what ``rotary_base`` turns by.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    beta: Tensor | None = None
    step: Tensor | None = None
    rate: Tensor | None = None
    step_bias: Tensor | None = None
    skip: Tensor | None = None
    bonus: Tensor | None = None
    norm: Tensor | None = None
    norm_bias: Tensor | None = None
    z: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    position: Tensor | None = None

    def given(self) -> list[Tensor]:
        """Those that are there."""
        return [t for name in _OPERANDS if (t := getattr(self, name)) is not None]

    def ready(self) -> Operands:
        """As kernels on a GPU read them: weights without gaps, the last axis of the others dense."""
        found = {}
        for name in _OPERANDS:
            t = getattr(self, name)
            along_time = name in ("beta", "step", "z", "key", "value")
            found[name] = t if t is None else dense(t) if along_time else t.contiguous()
        return Operands(**found)


_OPERANDS = tuple(f.name for f in fields(Operands))
