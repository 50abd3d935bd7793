"""The definition of a fused mixer: the other ops, one after the other, in torch.

    x = silu(conv(mixed))               where the plan has a convolution
    q, k, v = channels of x             features, unit length or rotation of q and k
    g = the plan's decay of step        v = v * softplus(step + bias) where values are stepped
    o, S = recurrence(q, k, v, g, ...)  from the state before; o / (o_z + eps) where there is a normaliser
    y = norm(o + skip * v) * gate(z)    or norm((o + skip * v) * gate(z))

It is the oracle of the kernels, and what serves where they refuse a call: in training, in float64, on any device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linstate.ops.causal_conv1d import causal_conv1d
from linstate.ops.delta_rule import delta_rule
from linstate.ops.dispatch import register
from linstate.ops.features import elu_plus_one, l2_norm, rotate
from linstate.ops.fused.plan import Operands, Plan
from linstate.ops.gates import softplus_decay
from linstate.ops.linear_attention import linear_attention
from linstate.types import state_dtype

GATES: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid}
Norm = Callable[[Tensor], Tensor]


def run(
    plan: Plan,
    mixed: Tensor,
    matrix: Tensor | None,
    tail: Tensor | None,
    of: Operands,
    cu_seqlens: Tensor | None,
    bounds: list[int] | None,
    norm: Norm | None,
    form: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`linstate.ops.fused`. ``form``: of the ops inside."""
    how: dict[str, Any] = {"cu_seqlens": cu_seqlens, "form": form}
    if form != "auto":
        how["backend"] = "torch"
    tokens = mixed.shape[:2]
    at, channels, taps = plan.conv
    if taps:
        assert of.weight is not None
        mixed, tail = causal_conv1d(
            mixed[..., at : at + channels], of.weight, of.bias, activation="silu", initial_state=tail, **how
        )
        plan = plan.behind_conv
    else:
        rows = mixed.shape[0] if bounds is None else len(bounds) - 1
        tail = mixed.new_empty((rows, 0, 0), dtype=torch.float32)
    q = mixed[..., plan.q_at : plan.q_at + plan.hk * plan.k]
    k = mixed[..., plan.k_at : plan.k_at + plan.hk * plan.k] if of.key is None else of.key
    v = mixed[..., plan.v_at : plan.v_at + plan.hv * plan.v] if of.value is None else of.value
    q, k, v = _heads(q, plan.hk), _heads(k, plan.hk), _heads(v, plan.hv)  # [B, T, H, D]
    if plan.unit_eps is not None:
        q, k = l2_norm(q, plan.unit_eps), l2_norm(k, plan.unit_eps)
    if plan.elu_plus_one:
        q, k = elu_plus_one(q), elu_plus_one(k)
    if plan.rotary_base is not None:
        assert of.position is not None
        q, k = rotate(of.position, q, k, base=plan.rotary_base)
    g, step = _decay(plan, of, mixed, tokens)
    value = v
    if plan.stepped_values:
        assert step is not None
        value = (v * step[..., None]).to(v.dtype)
    if plan.normaliser_eps is not None:
        value = torch.cat([value, torch.ones_like(value[..., :1])], dim=-1)  # [B, T, Hv, V + 1]
    how |= {"scale": plan.scale, "initial_state": matrix}
    if plan.recurrence == "delta_rule":
        assert of.beta is not None
        o, after = delta_rule(q, k, value, of.beta.sigmoid() * plan.beta_scale, g, **how)
    else:
        o, after = linear_attention(q, k, value, g, bonus=of.bonus, **how)
    if plan.normaliser_eps is not None:
        o = o[..., :-1] / (o[..., -1:] + plan.normaliser_eps)  # [B, T, Hv, V]
    if of.skip is not None:
        o = o + v * of.skip[:, None]
    return _finish(plan, of, o, norm), after, tail


def _heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1))


def _decay(plan: Plan, of: Operands, x: Tensor, tokens: torch.Size) -> tuple[Tensor | None, Tensor | None]:
    """The log decays g, and, where values are stepped, the step ``[B, T, Hv]``."""
    wide = state_dtype(x)
    if plan.decay == "none":
        return None, None
    if plan.decay == "fixed":
        return of.rate, None
    if plan.decay == "exponential":
        assert of.step_bias is not None
        bias = of.step_bias.to(wide)  # of a sum near -5 bfloat16 keeps two digits
        decay = bias if of.step is None else bias + of.step.to(wide)
        return _heads(-decay.exp().expand(*tokens, -1), plan.hk), None
    assert of.step is not None
    if plan.decay == "sigmoid":
        return F.logsigmoid(_heads(of.step, plan.hk).to(wide)) / plan.divisor, None
    assert of.rate is not None and of.step_bias is not None
    if plan.decay == "channel":
        rate = of.rate[:, None].expand(-1, plan.k).flatten()  # [H * K]
        return _heads(softplus_decay(of.step, of.step_bias, rate), plan.hk), None
    step = F.softplus(of.step.to(wide) + of.step_bias.to(wide))  # [B, T, H]
    if plan.limits != (0.0, float("inf")):
        step = step.clamp(*plan.limits)
    return -of.rate.to(wide).exp() * step, step


def _finish(plan: Plan, of: Operands, o: Tensor, norm: Norm | None) -> Tensor:
    """The norm and the output gate, ``[B, T, Hv, V] -> [B, T, Hv V]``."""
    norm = norm or partial(normed, plan, of)
    gated = None if of.z is None else GATES[plan.gate](of.z)
    o = o.flatten(-2) if plan.norm in ("group", "none") else o
    if plan.gate_first and gated is not None:
        o, gated = o * gated, None
    if plan.norm != "none":
        o = norm(o)
    o = o.flatten(-2) if o.dim() == 4 else o
    return o if gated is None else o * gated


def normed(plan: Plan, of: Operands, o: Tensor) -> Tensor:
    """The plan's norm, computed in float32 (float64 for float64)."""
    assert of.norm is not None
    wide = o if o.dtype == torch.float64 else o.float()
    weight = of.norm.to(wide.dtype)
    if plan.norm == "head":
        return F.rms_norm(wide, (plan.v,), weight, plan.norm_eps).to(o.dtype)
    if plan.norm == "group":
        if plan.hk == 1:
            return F.rms_norm(wide, (o.shape[-1],), weight, plan.norm_eps).to(o.dtype)
        groups = _heads(wide, plan.hk)
        return (F.rms_norm(groups, (groups.shape[-1],), eps=plan.norm_eps).flatten(-2) * weight).to(o.dtype)
    found = F.layer_norm(wide, (plan.v,), eps=plan.norm_eps).flatten(-2) * weight  # [B, T, Hv V]
    return (found if of.norm_bias is None else found + of.norm_bias.to(wide.dtype)).to(o.dtype)


def _enter(form: str, inside: str) -> None:
    @register("fused", form, "torch", packs=True)
    def torch_fused(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return run(*arguments, form=inside)  # type: ignore[misc]


for _form, _inside in (("recurrent", "recurrent"), ("chunked", "auto"), ("step", "auto")):
    _enter(_form, _inside)
