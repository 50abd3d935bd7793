"""Falcon-H1: Mamba-2 and attention side by side in every layer, and a multiplier for almost everything.

Those that scale what goes into a branch are here factors on what its first projection makes, which is the same as long
as that has no bias.

Source: transformers ``models/falcon_h1``; Falcon-H1, Zuo 2025, arXiv 2507.22448.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from linstate.errors import ConfigError
from linstate.models.config import ModelConfig
from linstate.models.families import _mamba
from linstate.models.families import _parts as parts
from linstate.models.families._rules import Table, rule, under
from linstate.models.families._settings import Settings
from linstate.models.families.base import Family

BOTH = "mamba2+attention"


class FalconH1(Family):
    """See the module."""

    model_types = ("falcon_h1",)
    mixers = ("mamba2", "attention")
    checked = "all multipliers, norm before and behind the gate and none, grouped heads, limits of dt, biases, tied head"

    def config(self, settings: Settings) -> ModelConfig:
        settings.only("hidden_act", "silu", default="silu")
        settings.only("mlp_bias", False, default=False)
        settings.only("mamba_use_mlp", True, default=True)
        settings.only("attn_layer_indices", None)
        settings.ignore("mlp_expansion_factor")
        into = settings.number("attention_in_multiplier", 1.0)
        out = settings.number("attention_out_multiplier", 1.0)
        gate, down = numbers(settings, "mlp_multipliers", 2)
        return ModelConfig(
            settings.integer("vocab_size"),
            settings.integer("hidden_size"),
            (BOTH,) * settings.integer("num_hidden_layers"),
            options={
                BOTH: {
                    "mamba2": mamba2(settings),
                    "attention": attention(settings, into),
                    "scales": [settings.number("ssm_out_multiplier", 1.0), into * out],
                },
                "swiglu": {"gate_multiplier": gate},
            },
            feed_forward="swiglu",
            d_ff=settings.integer("intermediate_size"),
            tie_embeddings=settings.flag("tie_word_embeddings", False),
            norm_eps=settings.number("rms_norm_eps", 1e-5),
            embedding_scale=settings.number("embedding_multiplier", 1.0),
            logit_scale=settings.number("lm_head_multiplier", 1.0),
            residual_scales={} if down == 1.0 else {"swiglu": (1.0, down)},
        )

    def weights(self, config: ModelConfig, settings: Settings, names: Collection[str]) -> Table:
        options = config.options[BOTH]
        table = [*parts.ends(config.tie_embeddings, norm="model.final_layernorm")]
        for i in range(config.num_layers):
            theirs, ours = f"model.layers.{i}.", f"layers.{i}."
            table.append(rule(f"{theirs}input_layernorm.weight", f"{ours}mixer_norm.weight"))
            table.append(rule(f"{theirs}pre_ff_layernorm.weight", f"{ours}ff_norm.weight"))
            rules = _mamba.mamba2_rules(norm=options["mamba2"]["norm"])
            table += under(f"{theirs}mamba.", f"{ours}mixer.parts.mamba2.", rules)
            rules = parts.attention(options["attention"])
            table += under(f"{theirs}self_attn.", f"{ours}mixer.parts.attention.", rules)
            table += under(f"{theirs}feed_forward.", f"{ours}ff.", parts.swiglu(config.d_ff or 0))
        return table


def numbers(settings: Settings, name: str, count: int) -> list[float]:
    """So many numbers, ones where there are none. Raises ConfigError."""
    value = settings.take(name, [1.0] * count)
    if (
        not isinstance(value, list)
        or len(value) != count
        or not all(isinstance(v, int | float) for v in value)
    ):
        raise ConfigError(f"{settings.where}: {name} must be {count} numbers, found {value!r}")
    return [float(v) for v in value]


def mamba2(settings: Settings) -> dict[str, Any]:
    """Options of the Mamba-2 half."""
    settings.only("projectors_bias", False, default=False)
    inner = settings.integer("mamba_d_ssm", _mamba.expanded(settings))
    if settings.has("mamba_d_ssm"):
        settings.ignore("mamba_expand")
    norm = settings.flag("mamba_rms_norm", False)
    before = settings.flag("mamba_norm_before_gate", True)
    if not norm:
        settings.ignore("mamba_norm_before_gate")
    factor = settings.number("ssm_in_multiplier", 1.0)
    return {
        **_mamba.mamba2_mixer(settings, settings.number("rms_norm_eps", 1e-5), inner),
        "dt_limit": _mamba.limits(settings),
        "norm": norm,
        "norm_before_gate": before and norm,
        "multipliers": [factor * v for v in numbers(settings, "ssm_multipliers", 5)],
    }


def attention(settings: Settings, into: float) -> dict[str, Any]:
    """Options of the attention half, whose input has the factor ``into``; that of v is left to its output."""
    options = _mamba.rotated(settings, _mamba.attention(settings))
    if options["bias"] and into != 1.0:
        raise ConfigError(
            f"{settings.where}: attention_in_multiplier is {into} beside an attention_bias, which Linstate does not do"
        )
    key = settings.number("key_multiplier", 1.0)
    return {**options, "scale": into**2 * key * options["head_dim"] ** -0.5}
