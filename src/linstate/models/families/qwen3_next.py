"""Qwen3-Next: three layers of Gated DeltaNet to one of gated attention, mixtures of experts; norms about one.

Source: transformers ``models/qwen3_next``; Qwen3-Next-80B-A3B. What the checkpoints hold for predicting several tokens
at once (``mtp``) is not read.
"""

from __future__ import annotations

from collections.abc import Collection

from linstate.models.config import ModelConfig
from linstate.models.families import _parts as parts
from linstate.models.families._rules import Concat, Each, Rule, Table, interleaved, rule, under
from linstate.models.families._settings import Settings
from linstate.models.families.base import Family

KINDS = {"linear_attention": "gated_deltanet", "full_attention": "attention"}


class Qwen3Next(Family):
    """See the module."""

    model_types = ("qwen3_next",)
    mixers = ("gated_deltanet", "attention")
    checked = "grouped heads, dense layers among experts, norm_topk_prob, partial rotary, attention biases, tied head"
    ignored = {r"mtp\.": "prediction of several tokens at once"}  # noqa: RUF012

    def config(self, settings: Settings) -> ModelConfig:
        layers = settings.integer("num_hidden_layers")
        every = settings.integer("full_attention_interval", 4)
        default = ["full_attention" if (i + 1) % every == 0 else "linear_attention" for i in range(layers)]
        pattern = settings.listed("layer_types", KINDS, default, layers)
        dense = settings.take("mlp_only_layers", [])
        step, experts = settings.integer("decoder_sparse_step", 1), settings.integer("num_experts", 512)
        feed_forward = tuple(
            "experts" if experts > 0 and i not in dense and (i + 1) % step == 0 else "swiglu"
            for i in range(layers)
        )
        return ModelConfig(
            settings.integer("vocab_size"),
            settings.integer("hidden_size"),
            pattern,
            options=parts.used(
                pattern + feed_forward,
                gated_deltanet=gated_deltanet(settings),
                attention=attention(settings),
                experts=mixture(settings, experts),
            ),
            feed_forward=feed_forward,
            d_ff=settings.integer("intermediate_size", 5632),
            tie_embeddings=settings.flag("tie_word_embeddings", False),
            norm="zero_centred_rmsnorm",
            norm_eps=settings.number("rms_norm_eps", 1e-6),
        )

    def weights(self, config: ModelConfig, settings: Settings, names: Collection[str]) -> Table:
        table = [*parts.ends(config.tie_embeddings)]
        for i, (mixer, ff) in enumerate(zip(config.layers, config.feed_forwards, strict=True)):
            theirs, ours = f"model.layers.{i}.", f"layers.{i}."
            table += under(theirs, ours, norms())
            if mixer == "attention":
                rules = parts.attention(config.options["attention"])
                table += under(f"{theirs}self_attn.", f"{ours}mixer.", rules)
            else:
                table += under(f"{theirs}linear_attn.", f"{ours}mixer.", grouped_deltanet(config))
            table += feed_forward_rules(config, ff, f"{theirs}mlp.", f"{ours}ff.", names)
        return table


def gated_deltanet(settings: Settings) -> dict[str, object]:
    """Options of the linear layers."""
    settings.only("hidden_act", "silu", default="silu")
    return {
        "num_heads": settings.integer("linear_num_key_heads", 16),
        "head_dim": settings.integer("linear_key_head_dim", 128),
        "num_v_heads": settings.integer("linear_num_value_heads", 32),
        "v_head_dim": settings.integer("linear_value_head_dim", 128),
        "conv_width": settings.integer("linear_conv_kernel_dim", 4),
        "norm_eps": settings.number("rms_norm_eps", 1e-6),
    }


def attention(settings: Settings) -> dict[str, object]:
    """Options of the layers of gated attention."""
    rope, dim = settings.rope(part=0.25), settings.integer("head_dim", 256)
    return {
        "num_heads": settings.integer("num_attention_heads"),
        "num_kv_heads": settings.integer("num_key_value_heads", settings.integer("num_attention_heads")),
        "head_dim": dim,
        "rotary_base": rope.base,
        "rotary_dim": int(dim * rope.part),
        "qk_norm": "zero_centred",
        "output_gate": True,
        "bias": settings.flag("attention_bias", False),
        "norm_eps": settings.number("rms_norm_eps", 1e-6),
    }


def mixture(settings: Settings, count: int) -> dict[str, object]:
    """Options of the mixtures of experts."""
    return {
        "d_ff": settings.integer("moe_intermediate_size", 512),
        "num_experts": count,
        "top_k": settings.integer("num_experts_per_tok", 10),
        "router": "softmax",
        "renormalise": settings.flag("norm_topk_prob", True),
        "shared_width": settings.integer("shared_expert_intermediate_size", 512),
        "shared_gate": True,
    }


def norms() -> list[Rule]:
    """The two norms of a layer."""
    return [
        rule("input_layernorm.weight", "mixer_norm.weight"),
        rule("post_attention_layernorm.weight", "ff_norm.weight"),
    ]


def after_projection() -> list[Rule]:
    """Of a Gated DeltaNet layer, all but its projection."""
    return [
        *parts.convolution("conv1d"),
        rule("A_log", "A_log"),
        rule("dt_bias", "dt_bias"),
        rule("norm.weight", "norm.weight"),
        rule("out_proj.weight", "out_proj.weight"),
    ]


def grouped_deltanet(config: ModelConfig) -> list[Rule]:
    """A Gated DeltaNet layer whose projections hold, for each key head, its q, k, v and z, and its beta and a."""
    options = config.options["gated_deltanet"]
    hk, hv, k, v = (options[name] for name in ("num_heads", "num_v_heads", "head_dim", "v_head_dim"))
    per = hv // hk
    parts_of_head = interleaved([k, k, per * v, per * v], hk), interleaved([per, per], hk)
    rows = Concat(2 * hk * k + 2 * hv * v, 2 * hv)
    return [
        rule(("in_proj_qkvz.weight", "in_proj_ba.weight"), "in_proj.weight", Each(*parts_of_head), rows),
        *after_projection(),
    ]


def feed_forward_rules(
    config: ModelConfig, kind: str, theirs: str, ours: str, names: Collection[str]
) -> list[Rule]:
    """A feed-forward: dense, or a mixture with one shared expert and its gate."""
    if kind == "swiglu":
        return under(theirs, ours, parts.swiglu(config.d_ff or 0))
    options = config.options["experts"]
    return [
        *under(
            theirs,
            ours,
            [
                rule("gate.weight", "router.weight"),
                rule("shared_expert_gate.weight", "shared_gate.weight"),
            ],
        ),
        *under(f"{theirs}shared_expert.", f"{ours}shared.", parts.swiglu(options["shared_width"])),
        *under("", ours, parts.experts(names, f"{theirs}experts", options["num_experts"], options["d_ff"])),
    ]
