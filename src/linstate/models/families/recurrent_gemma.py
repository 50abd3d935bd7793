"""RecurrentGemma (Griffin): two recurrent blocks to one of attention over a window; norms about one, capped logits.

Source: transformers ``models/recurrent_gemma``; RecurrentGemma 2B and 9B.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from linstate.mixers.base import divide
from linstate.models.config import ModelConfig
from linstate.models.families import _parts as parts
from linstate.models.families._rules import Concat, Rule, Stack, Table, rule, under
from linstate.models.families._settings import Settings
from linstate.models.families.base import Family, Header

KINDS = {"recurrent": "rglru", "attention": "sliding_window"}
BLOCK = ["recurrent", "recurrent", "attention"]
ACTIVATIONS = ("gelu_pytorch_tanh", "gelu_new")


class RecurrentGemma(Family):
    """See the module."""

    model_types = ("recurrent_gemma",)
    mixers = ("rglru", "sliding_window")
    checked = "grouped heads, attention biases, width of the recurrence, window, partial rotary, untied head"

    def config(self, settings: Settings) -> ModelConfig:
        layers, width = settings.integer("num_hidden_layers", 26), settings.integer("hidden_size", 2560)
        block = settings.listed("block_types", KINDS, BLOCK, None)
        settings.only("_block_types", BLOCK, default=BLOCK)  # of older files; theirs does not look at it
        settings.only("embeddings_scale_by_sqrt_dim", True, default=True)
        pattern = tuple(block[i % len(block)] for i in range(layers))
        settings.only("hidden_activation", *ACTIVATIONS, default=ACTIVATIONS[0])
        settings.ignore("w_init_variance_scale", "final_w_init_variance_scale")  # initial values
        heads, rope = settings.integer("num_attention_heads", 10), settings.rope(part=0.5)
        dim = divide(width, heads, "hidden_size into num_attention_heads")
        settings.only("head_dim", dim, default=dim)
        return ModelConfig(
            settings.integer("vocab_size", 256000),
            width,
            pattern,
            options=parts.used(
                (*pattern, "swiglu"),
                rglru={
                    "width": settings.integer("lru_width", width),
                    "num_heads": heads,
                    "conv_width": settings.integer("conv1d_width", 4),
                },
                sliding_window={
                    "window": settings.integer("attention_window_size", 2048),
                    "num_heads": heads,
                    "num_kv_heads": settings.integer("num_key_value_heads", heads),
                    "head_dim": dim,
                    "rotary_base": rope.base,
                    "rotary_dim": int(dim * rope.part),
                    "bias": settings.flag("attention_bias", False) or "out",
                },
                swiglu={"activation": "gelu_tanh", "bias": True},
            ),
            feed_forward="swiglu",
            d_ff=settings.integer("intermediate_size", 3 * 2560) // 2,
            tie_embeddings=settings.flag("tie_word_embeddings", True),
            norm="zero_centred_rmsnorm",
            norm_eps=settings.number("rms_norm_eps", 1e-6),
            embedding_scale=torch.tensor(width**0.5, dtype=torch.bfloat16).item(),  # theirs is rounded so
            logit_softcap=settings.number("logits_soft_cap", 30.0),
        )

    def weights(self, config: ModelConfig, settings: Settings, found: Mapping[str, Header]) -> Table:
        table = [*parts.ends(config.tie_embeddings, norm="model.final_norm")]
        for i, mixer in enumerate(config.layers):
            theirs, ours = f"model.layers.{i}.", f"layers.{i}."
            table += under(theirs, ours, parts.normed("temporal_pre_norm", "mixer_norm"))
            table += under(theirs, ours, parts.normed("channel_pre_norm", "ff_norm"))
            options = config.options[mixer]
            rules = recurrent(options["width"]) if mixer == "rglru" else parts.attention(options)
            table += under(f"{theirs}temporal_block.", f"{ours}mixer.", rules)
            table += under(f"{theirs}mlp_block.", f"{ours}ff.", parts.swiglu(config.d_ff or 0, bias=True))
        return table


def recurrent(width: int) -> list[Rule]:
    """A recurrent block."""
    both = Concat(width, width)
    return [
        rule(("linear_x.weight", "linear_y.weight"), "in_proj.weight", both),
        rule(("linear_x.bias", "linear_y.bias"), "in_proj.bias", both),
        *parts.convolution("conv_1d", bias=True),
        *under(
            "rg_lru.",
            "",
            [
                rule(("input_gate_weight", "recurrent_gate_weight"), "gate_weight", Stack()),
                rule(("input_gate_bias", "recurrent_gate_bias"), "gate_bias", Stack()),
                rule("recurrent_param", "decay"),
            ],
        ),
        rule("linear_out.weight", "out_proj.weight"),
        rule("linear_out.bias", "out_proj.bias"),
    ]
