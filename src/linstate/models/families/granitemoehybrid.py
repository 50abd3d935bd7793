"""Granite 4: layers of Mamba-2 and of attention, mixtures of experts beside an expert for all, and multipliers.

The embeddings, each branch of the residual stream, the products of queries and keys and the logits have a factor each.

Source: transformers ``models/granitemoehybrid``; ibm-granite/granite-4.0-h-tiny.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from linstate.models.config import ModelConfig
from linstate.models.families import _mamba
from linstate.models.families import _parts as parts
from linstate.models.families._rules import Table, rule, under
from linstate.models.families._settings import Settings
from linstate.models.families.base import Family


class GraniteMoeHybrid(Family):
    """See the module."""

    model_types = ("granitemoehybrid",)
    mixers = ("mamba2", "attention")
    checked = "four multipliers, experts on and off, positions on and off, grouped heads, limits of dt, biases, tied head"

    def config(self, settings: Settings) -> ModelConfig:
        layers, eps = settings.integer("num_hidden_layers"), settings.number("rms_norm_eps", 1e-6)
        pattern = settings.listed("layer_types", _mamba.LAYERS, ["linear_attention"] * layers, layers)
        _mamba.held(settings, "layers_block_type", settings.take("layer_types", None))
        settings.only("hidden_act", "silu", default="silu")
        settings.only("normalization_function", "rmsnorm", default="rmsnorm")
        settings.ignore("init_method")
        mamba2 = _mamba.mamba2_mixer(settings, eps, _mamba.expanded(settings))
        ff = "experts" if settings.integer("num_local_experts", 8) > 0 else "swiglu"
        experts = mixture(settings) if ff == "experts" else {}
        dense = settings.integer("shared_intermediate_size", 1024)
        if ff == "swiglu":
            settings.ignore("num_experts_per_tok", "intermediate_size")
        factor = (1.0, settings.number("residual_multiplier", 1.0))
        return ModelConfig(
            settings.integer("vocab_size"),
            settings.integer("hidden_size"),
            pattern,
            options=parts.used(
                (*pattern, ff),
                mamba2={**mamba2, "dt_limit": _mamba.limits(settings)},
                attention=attention(settings),
                experts=experts,
            ),
            feed_forward=ff,
            d_ff=settings.integer("intermediate_size", 11008) if ff == "experts" else dense,
            tie_embeddings=settings.flag("tie_word_embeddings", False),
            norm_eps=eps,
            embedding_scale=settings.number("embedding_multiplier", 1.0),
            logit_scale=1 / settings.number("logits_scaling", 1.0),
            residual_scales={name: factor for name in (*dict.fromkeys(pattern), ff) if factor[1] != 1.0},
        )

    def weights(self, config: ModelConfig, settings: Settings, names: Collection[str]) -> Table:
        table = [*parts.ends(config.tie_embeddings)]
        for i, (mixer, ff) in enumerate(zip(config.layers, config.feed_forwards, strict=True)):
            theirs, ours = f"model.layers.{i}.", f"layers.{i}."
            table.append(rule(f"{theirs}input_layernorm.weight", f"{ours}mixer_norm.weight"))
            table.append(rule(f"{theirs}post_attention_layernorm.weight", f"{ours}ff_norm.weight"))
            if mixer == "attention":
                rules = parts.attention(config.options["attention"])
                table += under(f"{theirs}self_attn.", f"{ours}mixer.", rules)
            else:
                table += under(f"{theirs}mamba.", f"{ours}mixer.", _mamba.mamba2_rules())
            linear = [
                rule("input_linear.weight", "up.weight"),  # gate and up, one behind the other
                rule("output_linear.weight", "down.weight"),
            ]
            shared = f"{ours}ff." if ff == "swiglu" else f"{ours}ff.shared."
            table += under(f"{theirs}shared_mlp.", shared, linear)
            if ff == "experts":
                routed = [
                    rule("input_linear.weight", "up"),
                    rule("output_linear.weight", "down"),
                    rule("router.layer.weight", "router.weight"),
                ]
                table += under(f"{theirs}block_sparse_moe.", f"{ours}ff.", routed)
        return table


def attention(settings: Settings) -> dict[str, Any]:
    """Options of the attention layers."""
    options = {**_mamba.attention(settings), "scale": settings.number("attention_multiplier", 1.0)}
    turned = _mamba.rotated(settings, options)
    if settings.only("position_embedding_type", None, "nope", "rope") == "rope":
        return turned
    settings.ignore("rope_theta", "partial_rotary_factor")
    return options


def mixture(settings: Settings) -> dict[str, Any]:
    """Options of the mixtures of experts."""
    return {
        "num_experts": settings.integer("num_local_experts", 8),
        "top_k": settings.integer("num_experts_per_tok", 2),
        "router": "softmax",  # of the chosen: the same as of all, divided by the sum of the chosen
        "shared_width": settings.integer("shared_intermediate_size", 1024),
    }
