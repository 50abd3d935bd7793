"""Weights of Hugging Face's layers under our names: what the tests of layers copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from linstate.models.families._rules import Rule

Weights = dict[str, Tensor]


def under(prefix: str, weights: Weights) -> Weights:
    return {f"{prefix}.{name}": tensor for name, tensor in weights.items()}


def swiglu(theirs: Any) -> Weights:
    return {
        "up.weight": torch.cat([theirs.gate_proj.weight, theirs.up_proj.weight]),
        "down.weight": theirs.down_proj.weight,
    }


def experts(theirs: Any) -> Weights:
    """Kimi Linear's and DeepSeek-V3's mixture, with a bias for the choice, or Qwen3-Next's, with a gate."""
    gated = hasattr(theirs, "shared_expert_gate")
    found = {
        "router.weight": theirs.gate.weight,
        "up": theirs.experts.gate_up_proj,
        "down": theirs.experts.down_proj,
        **under("shared", swiglu(theirs.shared_expert if gated else theirs.shared_experts)),
    }
    if gated:
        return {**found, "shared_gate.weight": theirs.shared_expert_gate.weight}
    return {**found, "bias": theirs.gate.e_score_correction_bias}


def kimi_delta(theirs: Any) -> Weights:
    rows = ("q_proj", "k_proj", "v_proj", "b_proj", "forget_gate.f_a_proj", "g_a_proj")
    return {
        "in_proj.weight": torch.cat([theirs.get_submodule(name).weight for name in rows]),
        "conv.weight": theirs.conv1d.weight.squeeze(1),
        "A_log": theirs.forget_gate.A_log.flatten(),
        "dt_bias": theirs.forget_gate.dt_bias,
        "decay_proj.weight": theirs.forget_gate.f_b_proj.weight,
        "gate_proj.weight": theirs.g_b_proj.weight,
        "norm.weight": theirs.o_norm.weight,
        "out_proj.weight": theirs.o_proj.weight,
    }


def mla(theirs: Any, *, interleaved: bool = False) -> Weights:
    """DeepSeek-V3's layer, whose rotary channels may be interleaved, and Kimi Linear's."""
    two, heads = theirs.q_proj is None, theirs.num_heads
    q, down = (theirs.q_b_proj if two else theirs.q_proj).weight, theirs.kv_a_proj_with_mqa.weight
    if interleaved:
        q = _paired(q.unflatten(0, (heads, -1)), theirs.qk_nope_head_dim).flatten(0, 1)
        down = _paired(down, theirs.kv_lora_rank)
    found = {
        "in_proj.weight": torch.cat([theirs.q_a_proj.weight if two else q, down]),
        "norm.weight": theirs.kv_a_layernorm.weight,
        "kv_up.weight": theirs.kv_b_proj.weight,
        "out_proj.weight": theirs.o_proj.weight,
    }
    latent = {"q_up.0.weight": theirs.q_a_layernorm.weight, "q_up.1.weight": q} if two else {}
    return {**found, **latent}


def _paired(weight: Tensor, before: int) -> Tensor:
    """Rows ``[..., before + Kr, D]`` whose last Kr turn in pairs (0, 1), (2, 3), ...: in pairs (0, Kr / 2), ... as ours."""
    still, turned = weight[..., :before, :], weight[..., before:, :]
    return torch.cat([still, turned[..., ::2, :], turned[..., 1::2, :]], dim=-2)


def by_rules(theirs: Any, rules: Sequence[Rule]) -> Weights:
    """The weights of a layer by the rules of its family."""
    weights: Weights = theirs.state_dict()
    return {name: t for rule in rules for name, t in rule.load(weights.__getitem__).items()}
