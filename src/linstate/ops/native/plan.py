"""A mixer's plan as the native kernels have it: a structure with named fields, made once."""

from __future__ import annotations

from linstate.ops.fused.plan import Plan
from linstate.ops.native import lib


def carried_out(plan: Plan) -> lib.MixerPlan:
    """A plan as ``csrc/bind/mixer.cpp`` has it."""
    made: lib.MixerPlan | None = plan.made.get("native")
    if made is not None:
        return made
    made = lib.MixerPlan()
    for name in ("hk", "hv", "k", "v", "q_at", "k_at", "v_at", "scale", "norm_eps", "beta_scale", "divisor"):
        setattr(made, name, getattr(plan, name))
    for name in ("stepped_values", "elu_plus_one", "gate_first"):
        setattr(made, name, getattr(plan, name))
    made.recurrence = getattr(lib.Recurrence, plan.recurrence)
    made.decay = getattr(lib.Decay, plan.decay)
    made.norm, made.gate = getattr(lib.Norm, plan.norm), getattr(lib.OutputGate, plan.gate)
    made.conv_at, made.channels, made.taps = plan.conv
    made.step_low, made.step_high = plan.limits
    made.unit_eps = -1.0 if plan.unit_eps is None else plan.unit_eps
    made.normaliser_eps = -1.0 if plan.normaliser_eps is None else plan.normaliser_eps
    made.rotary_base = plan.rotary_base or 0.0
    plan.made["native"] = made
    return made
