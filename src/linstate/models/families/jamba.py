"""Jamba: layers of Mamba, with norms of dt, B and C, and of attention without positions; some feed-forwards are mixtures.

Source: transformers ``models/jamba``; ai21labs/Jamba-v0.1. Their code forgets the state of the scan when it goes on by
more than one token.
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


class Jamba(Family):
    """See the module."""

    model_types = ("jamba",)
    mixers = ("mamba", "attention")
    checked = "periods and offsets of attention and experts, grouped heads, dense models, tied head"

    def config(self, settings: Settings) -> ModelConfig:
        layers, experts = settings.integer("num_hidden_layers"), settings.integer("num_experts", 16)
        pattern = periodic(settings, "attn_layer", 8, 4, ("attention", "mamba"), layers)
        feed_forward = periodic(settings, "expert_layer", 2, 1, ("experts", "swiglu"), layers)
        if experts == 1:
            feed_forward = ("swiglu",) * layers
            settings.ignore("expert_layer_period", "expert_layer_offset", "num_experts_per_tok")
        settings.only("hidden_act", "silu", default="silu")
        settings.only("mamba_inner_layernorms", True, default=True)
        settings.only("sliding_window", None)
        return ModelConfig(
            settings.integer("vocab_size"),
            settings.integer("hidden_size"),
            pattern,
            options=parts.used(
                pattern + feed_forward,
                mamba=mamba(settings),
                attention={**_mamba.attention(settings), "bias": False},
                experts={
                    "num_experts": experts,
                    "top_k": settings.integer("num_experts_per_tok", 2),
                    "router": "softmax",
                    "renormalise": False,
                    "shared": 0,
                },
            ),
            feed_forward=feed_forward,
            d_ff=settings.integer("intermediate_size"),
            tie_embeddings=settings.flag("tie_word_embeddings", False),
            norm_eps=settings.number("rms_norm_eps", 1e-6),
        )

    def weights(self, config: ModelConfig, settings: Settings, names: Collection[str]) -> Table:
        table = [*parts.ends(config.tie_embeddings, norm="model.final_layernorm")]
        for i, (mixer, ff) in enumerate(zip(config.layers, config.feed_forwards, strict=True)):
            theirs, ours = f"model.layers.{i}.", f"layers.{i}."
            table.append(rule(f"{theirs}input_layernorm.weight", f"{ours}mixer_norm.weight"))
            table.append(rule(f"{theirs}pre_ff_layernorm.weight", f"{ours}ff_norm.weight"))
            if mixer == "attention":
                rules = parts.attention(config.options["attention"])
                table += under(f"{theirs}self_attn.", f"{ours}mixer.", rules)
            else:
                table += under(f"{theirs}mamba.", f"{ours}mixer.", _mamba.mamba_rules(norms=True))
            width = config.d_ff or 0
            if ff == "swiglu":
                table += under(f"{theirs}feed_forward.", f"{ours}ff.", parts.swiglu(width))
            else:
                count = config.options["experts"]["num_experts"]
                table.append(rule(f"{theirs}feed_forward.router.weight", f"{ours}ff.router.weight"))
                rules = parts.experts(names, f"{theirs}feed_forward.experts", count, width)
                table += under("", f"{ours}ff.", rules)
        return table


def periodic(
    settings: Settings, name: str, period: int, offset: int, kinds: tuple[str, str], layers: int
) -> tuple[str, ...]:
    """The first of ``kinds`` once in every period, from an offset on, else the second. Raises ConfigError."""
    period = settings.integer(f"{name}_period", period)
    offset = settings.integer(f"{name}_offset", offset)
    if not 0 <= offset < period:
        raise ConfigError(
            f"{settings.where}: {name}_offset must lie below {name}_period {period}, found {offset}"
        )
    return tuple(kinds[0] if i % period == offset else kinds[1] for i in range(layers))


def mamba(settings: Settings) -> dict[str, Any]:
    """Options of the Mamba layers."""
    settings.only("mamba_conv_bias", True, default=True)
    settings.only("mamba_proj_bias", False, default=False)
    settings.ignore("use_mamba_kernels", "use_mambapy", "use_associative_scan")
    return {
        **_mamba.scan(settings, "mamba_expand", "mamba_dt_rank"),
        "state_size": settings.integer("mamba_d_state", 16),
        "conv_width": settings.integer("mamba_d_conv", 4),
        "norm": "rmsnorm",
        "norm_eps": settings.number("rms_norm_eps", 1e-6),
    }
