"""MiniMax-Text-01: lightning attention and softmax attention, mixtures of experts; norms in the residual stream itself.

The decays of a lightning layer follow from its place; the checkpoints hold them too, and they are held against ours.

Source: transformers ``models/minimax``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from linstate.models.config import ModelConfig
from linstate.models.families import _parts as parts
from linstate.models.families._rules import Concat, Each, Redundant, Rule, Table, interleaved, rule, under
from linstate.models.families._settings import Settings
from linstate.models.families.base import Family, Header


class MiniMax(Family):
    """See the module."""

    model_types = ("minimax",)
    mixers = ("lightning", "attention", "sliding_window")
    checked = "grouped heads, scales of the residual sums, block_size, a window, tied head"

    def config(self, settings: Settings) -> ModelConfig:
        layers, width = settings.integer("num_hidden_layers"), settings.integer("hidden_size")
        window = settings.integer("sliding_window") if settings.take("sliding_window", None) else None
        softmax = "attention" if window is None else "sliding_window"
        default = ["linear_attention" if i % 2 else "full_attention" for i in range(layers)]
        kinds = {"linear_attention": "lightning", "full_attention": softmax}
        pattern = settings.listed("layer_types", kinds, default, layers)
        settings.only("hidden_act", "silu", default="silu")
        heads, rope = settings.integer("num_attention_heads"), settings.rope(1e6)
        settings.one_part(rope)
        dim = settings.integer("head_dim", width // heads)
        attention = {
            "num_heads": heads,
            "num_kv_heads": settings.integer("num_key_value_heads", heads),
            "head_dim": dim,
            "rotary_base": rope.base,
        }
        experts = {
            "d_ff": settings.integer("intermediate_size"),
            "num_experts": settings.first("num_local_experts", "num_experts", default=8),
            "top_k": settings.integer("num_experts_per_tok", 2),
            "router": "softmax",
            "shared": 0,
        }
        scales = {
            name: tuple(settings.number(f"{kind}_{factor}_factor", 1.0) for factor in ("alpha", "beta"))
            for name, kind in (("lightning", "linear_attn"), (softmax, "full_attn"), ("experts", "mlp"))
        }
        return ModelConfig(
            settings.integer("vocab_size"),
            width,
            pattern,
            options=parts.used(
                (*pattern, "experts"),
                lightning={"num_heads": heads, "head_dim": dim},
                attention=attention,
                sliding_window={"window": window, **attention},
                experts=experts,
            ),
            feed_forward="experts",
            tie_embeddings=settings.flag("tie_word_embeddings", False),
            norm_eps=settings.number("rms_norm_eps", 1e-5),
            norm_place=dict.fromkeys(pattern, "both"),
            residual_scales={
                name: scale
                for name, scale in scales.items()
                if scale != (1.0, 1.0) and name in (*pattern, "experts")
            },
        )

    def weights(self, config: ModelConfig, settings: Settings, found: Mapping[str, Header]) -> Table:
        table = [*parts.ends(config.tie_embeddings)]
        block, experts = settings.integer("block_size", 256), config.options["experts"]
        for i, mixer in enumerate(config.layers):
            theirs, ours = f"model.layers.{i}.", f"layers.{i}."
            options = config.options[mixer]
            rules = lightning(options) if mixer == "lightning" else parts.attention(options)
            moe = f"{theirs}block_sparse_moe."
            count, d_ff = experts["num_experts"], experts["d_ff"]
            table += [
                rule(f"{theirs}input_layernorm.weight", f"{ours}mixer_norm.weight"),
                rule(f"{theirs}post_attention_layernorm.weight", f"{ours}ff_norm.weight"),
                *under(f"{theirs}self_attn.", f"{ours}mixer.", rules),
                rule(f"{moe}gate.weight", f"{ours}ff.router.weight"),
                *under(
                    "", f"{ours}ff.", parts.experts(found, f"{moe}experts", count, d_ff, "w1", "w3", "w2")
                ),
            ]
            if mixer == "lightning":
                rates = decay_rates(options["num_heads"], i, config.num_layers)
                table += decays(f"{theirs}self_attn.", rates, block)
        return table


def lightning(options: Mapping[str, int]) -> list[Rule]:
    """A layer of lightning attention, whose projection holds for each head its q, k and v."""
    h, d = options["num_heads"], options["head_dim"]
    steps = Each(interleaved([d, d, d], h), None), Concat(3 * h * d, h * d)
    return [
        rule(("qkv_proj.weight", "output_gate.weight"), "in_proj.weight", *steps),
        rule("norm.weight", "norm.weight"),
        rule("out_proj.weight", "out_proj.weight"),
    ]


def decay_rates(heads: int, layer: int, layers: int) -> Tensor:
    """``[H, 1, 1]``, as their layer makes them."""
    rates = (1 / 2 ** (8 / heads)) ** torch.arange(1, heads + 1)
    return (rates * (1 - layer / (layers - 1 + 1e-5) + 1e-5))[:, None, None]


def decays(prefix: str, rates: Tensor, block: int) -> list[Redundant]:
    """What they keep of decays inside a block of tokens."""
    at = torch.arange(1, block + 1)[:, None]  # [block, 1]
    apart = at - at.T  # [block, block]
    made = {
        "slope_rate": rates,
        "query_decay": torch.exp(-rates * at),
        "key_decay": torch.exp(-rates * (block - at)),
        "diagonal_decay": torch.exp(-rates * apart).masked_fill(apart < 0, 0.0)[None],
    }
    return [Redundant(f"{prefix}{name}", partial(_made, value)) for name, value in made.items()]


def _made(value: Tensor, _: object) -> Tensor:
    return value
