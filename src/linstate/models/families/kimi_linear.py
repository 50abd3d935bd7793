"""Kimi Linear: three layers of Kimi Delta Attention to one of latent attention without positions, mixtures of experts.

It reads the configurations that transformers writes and those of the released models (``linear_attn_config``).

Source: transformers ``models/kimi_linear``; Kimi-Linear-48B-A3B.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from linstate.errors import ConfigError
from linstate.models.config import ModelConfig
from linstate.models.families import _parts as parts
from linstate.models.families._rules import Concat, Reshape, Rule, Squeeze, Table, rule, under
from linstate.models.families._settings import Settings
from linstate.models.families.base import Family, Header

KINDS = {"linear_attention": "kimi_delta", "full_attention": "mla"}
FEED_FORWARDS = {"dense": "swiglu", "sparse": "experts"}


class KimiLinear(Family):
    """See the module."""

    model_types = ("kimi_linear",)
    mixers = ("kimi_delta", "mla")
    checked = "dense first layers, groups of experts, norm_topk_prob, shared experts, latent queries, released configurations"

    def config(self, settings: Settings) -> ModelConfig:
        layers = settings.integer("num_hidden_layers")
        linear, pattern = self._linear(settings, layers)
        first = settings.integer("first_k_dense_replace", 1)
        dense = ["dense" if i < first else "sparse" for i in range(layers)]
        feed_forward = settings.listed("mlp_layer_types", FEED_FORWARDS, dense, layers)
        heads, eps = settings.integer("num_attention_heads"), settings.number("rms_norm_eps", 1e-5)
        settings.only("num_key_value_heads", heads, default=heads)
        settings.only("hidden_act", "silu", default="silu")
        settings.only("attention_bias", False, default=False)
        settings.only("mla_use_nope", True, default=True)
        settings.only("rope_scaling", None)
        settings.only("tie_word_embeddings", False, default=False)  # their model would not tie them
        settings.only("moe_layer_freq", 1, default=1)
        settings.only("moe_router_activation_func", "sigmoid", default="sigmoid")
        settings.only("topk_method", "noaux_tc", default="noaux_tc")
        settings.only("num_nextn_predict_layers", 0, default=0)
        settings.ignore("head_dim", "qk_head_dim", "rope_theta")  # follow from others; there are no positions
        settings.ignore("use_grouped_topk")  # with one group it is the same, and with more it is always done
        mla = {
            "num_heads": heads,
            "head_dim": settings.integer("qk_nope_head_dim", 128),
            "v_head_dim": settings.integer("v_head_dim", 128),
            "kv_rank": settings.integer("kv_lora_rank", 512),
            "rotary_dim": settings.integer("qk_rope_head_dim", 64),
            "rotary_base": None,
            "norm_eps": 1e-6,  # fixed in their layer
        }
        if settings.take("q_lora_rank", None) is not None:
            mla["q_rank"] = settings.integer("q_lora_rank")
        experts = {
            "d_ff": settings.integer("moe_intermediate_size", 1024),
            "num_experts": settings.first("num_experts", "num_local_experts", default=256),
            "top_k": settings.first("num_experts_per_token", "num_experts_per_tok", default=8),
            "shared": settings.first("num_shared_experts", "n_shared_experts", default=1),
            "renormalise": bool(settings.first("moe_renormalize", "norm_topk_prob", default=True)),
            "scale": settings.number("routed_scaling_factor", 2.446),
            "groups": settings.first("num_expert_group", "n_group", default=1),
            "top_groups": settings.integer("topk_group", 1),
        }
        return ModelConfig(
            settings.integer("vocab_size"),
            settings.integer("hidden_size"),
            pattern,
            options=parts.used(
                pattern + feed_forward, kimi_delta={**linear, "norm_eps": eps}, mla=mla, experts=experts
            ),
            feed_forward=feed_forward,
            d_ff=settings.integer("intermediate_size"),
            tie_embeddings=False,
            norm_eps=eps,
        )

    def _linear(self, settings: Settings, layers: int) -> tuple[dict[str, Any], tuple[str, ...]]:
        """Options of the linear layers, and the pattern."""
        default = ["full_attention" if i and i % 4 == 0 else "linear_attention" for i in range(layers)]
        sizes = {
            "num_heads": settings.integer("linear_num_heads", 32),
            "head_dim": settings.integer("linear_head_dim", 128),
            "conv_width": settings.integer("linear_conv_kernel_dim", 4),
        }
        if settings.has("linear_attn_config"):
            inner = settings.part("linear_attn_config")
            names = {"num_heads": "num_heads", "head_dim": "head_dim", "conv_width": "short_conv_kernel_size"}
            sizes = {ours: inner.integer(theirs, sizes[ours]) for ours, theirs in names.items()}
            full, kda = inner.take("full_attn_layers", None), inner.take("kda_layers", None)  # counted from 1
            if full is not None and kda is not None:
                if sorted([*full, *kda]) != list(range(1, layers + 1)):
                    raise ConfigError(
                        f"{inner.where}: full_attn_layers and kda_layers must hold each of 1 to {layers} once, found {full} and {kda}"
                    )
                default = ["full_attention" if i + 1 in full else "linear_attention" for i in range(layers)]
        return sizes, settings.listed("layer_types", KINDS, default, layers)

    def weights(self, config: ModelConfig, settings: Settings, found: Mapping[str, Header]) -> Table:
        table = [*parts.ends(config.tie_embeddings)]
        for i, (mixer, ff) in enumerate(zip(config.layers, config.feed_forwards, strict=True)):
            theirs, ours = f"model.layers.{i}.", f"layers.{i}."
            rules = (latent if mixer == "mla" else kimi_delta)(config.options[mixer])
            table += [
                rule(f"{theirs}input_layernorm.weight", f"{ours}mixer_norm.weight"),
                rule(f"{theirs}post_attention_layernorm.weight", f"{ours}ff_norm.weight"),
                *under(f"{theirs}self_attn.", f"{ours}mixer.", rules),
            ]
            if ff == "swiglu":
                moe = f"{theirs}block_sparse_moe."  # so transformers 5.23 calls dense ones too
                dense = moe if f"{moe}gate_proj.weight" in found else f"{theirs}mlp."
                table += under(dense, f"{ours}ff.", parts.swiglu(config.d_ff or 0))
            else:
                table += mixture(config, f"{theirs}block_sparse_moe.", f"{ours}ff.", found)
        return table


def kimi_delta(options: Mapping[str, int]) -> list[Rule]:
    """A linear layer."""
    h, d = options["num_heads"], options["head_dim"]
    names = ("q_proj", "k_proj", "v_proj", "b_proj", "f_a_proj", "g_a_proj")
    return [
        rule([f"{n}.weight" for n in names], "in_proj.weight", Concat(h * d, h * d, h * d, h, d, d)),
        rule([f"{n}_conv1d.weight" for n in "qkv"], "conv.weight", Concat(*[h * d] * 3), Squeeze(1)),
        rule("A_log", "A_log", Reshape((1, 1, h, 1), (h,))),
        rule("dt_bias", "dt_bias"),
        rule("f_b_proj.weight", "decay_proj.weight"),
        rule("g_b_proj.weight", "gate_proj.weight"),
        rule("o_norm.weight", "norm.weight"),
        rule("o_proj.weight", "out_proj.weight"),
    ]


def latent(options: Mapping[str, int]) -> list[Rule]:
    """A layer of latent attention."""
    q_rank, heads = options.get("q_rank"), options["num_heads"]
    queries = heads * (options["head_dim"] + options["rotary_dim"])
    latents = options["kv_rank"] + options["rotary_dim"]
    q = "q_proj" if q_rank is None else "q_a_proj"
    rows = Concat(queries if q_rank is None else q_rank, latents)
    found = [
        rule((f"{q}.weight", "kv_a_proj_with_mqa.weight"), "in_proj.weight", rows),
        rule("kv_a_layernorm.weight", "norm.weight"),
        rule("kv_b_proj.weight", "kv_up.weight"),
        rule("o_proj.weight", "out_proj.weight"),
    ]
    if q_rank is not None:
        found += [
            rule("q_a_layernorm.weight", "q_up.0.weight"),
            rule("q_b_proj.weight", "q_up.1.weight"),
        ]
    return found


def mixture(config: ModelConfig, theirs: str, ours: str, found: Mapping[str, Header]) -> list[Rule]:
    """A mixture of experts whose router has a bias for the choice."""
    options = config.options["experts"]
    count, d_ff = options["num_experts"], options["d_ff"]
    return [
        rule(f"{theirs}gate.weight", f"{ours}router.weight"),
        rule(f"{theirs}gate.e_score_correction_bias", f"{ours}bias"),
        *under(f"{theirs}shared_experts.", f"{ours}shared.", parts.swiglu(options["shared"] * d_ff)),
        *under("", ours, parts.experts(found, f"{theirs}experts", count, d_ff, "w1", "w3", "w2")),
    ]
