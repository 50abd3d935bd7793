"""What Qwen3-Next and Qwen3.5 share: they differ in the layout of the linear layers' projections and in the feed-forwards."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from linstate.models.config import ModelConfig
from linstate.models.families import _parts as parts
from linstate.models.families._rules import Rule, rule, under
from linstate.models.families._settings import Settings

KINDS = {"linear_attention": "gated_deltanet", "full_attention": "attention"}
IGNORED = {r"mtp\.": "for predicting several tokens at once"}


def config(
    settings: Settings, feed_forward: Sequence[str], *, d_ff: int | None, tie: bool | None = None, **more: Any
) -> ModelConfig:
    """The configuration, with these feed-forwards and the options ``more`` of those of them that have options."""
    layers, every = settings.integer("num_hidden_layers"), settings.integer("full_attention_interval", 4)
    default = ["full_attention" if (i + 1) % every == 0 else "linear_attention" for i in range(layers)]
    pattern = settings.listed("layer_types", KINDS, default, layers)
    settings.only("hidden_act", "silu", default="silu")
    settings.only("use_sliding_window", False, default=False)
    options = {"gated_deltanet": gated_deltanet(settings), "attention": attention(settings), **more}
    return ModelConfig(
        settings.integer("vocab_size"),
        settings.integer("hidden_size"),
        pattern,
        options=parts.used((*pattern, *feed_forward), **options),
        feed_forward=tuple(feed_forward),
        d_ff=d_ff,
        tie_embeddings=settings.flag("tie_word_embeddings", False) if tie is None else tie,
        norm="zero_centred_rmsnorm",
        norm_eps=settings.number("rms_norm_eps", 1e-6),
    )


def gated_deltanet(settings: Settings) -> dict[str, Any]:
    """Options of the linear layers."""
    return {
        "num_heads": settings.integer("linear_num_key_heads", 16),
        "head_dim": settings.integer("linear_key_head_dim", 128),
        "num_v_heads": settings.integer("linear_num_value_heads", 32),
        "v_head_dim": settings.integer("linear_value_head_dim", 128),
        "conv_width": settings.integer("linear_conv_kernel_dim", 4),
        "norm_eps": settings.number("rms_norm_eps", 1e-6),
    }


def attention(settings: Settings) -> dict[str, Any]:
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


def mixture(settings: Settings, *, count: int, top_k: int) -> dict[str, Any]:
    """Options of the mixtures of experts. top_k: what it is where nothing is said."""
    return {
        "d_ff": settings.integer("moe_intermediate_size", 512),
        "num_experts": count,
        "top_k": settings.integer("num_experts_per_tok", top_k),
        "router": "softmax",
        "shared_width": settings.integer("shared_expert_intermediate_size", 512),
        "shared_gate": True,
    }


def heads(config: ModelConfig) -> tuple[int, int, int, int]:
    """Key heads, value heads, and the width of either, of the linear layers."""
    options = config.options.get("gated_deltanet") or dict.fromkeys(
        ("num_heads", "num_v_heads", "head_dim", "v_head_dim"), 1
    )
    return options["num_heads"], options["num_v_heads"], options["head_dim"], options["v_head_dim"]


def layers(
    config: ModelConfig, found: Collection[str], prefix: str, projections: Sequence[Rule]
) -> list[Rule]:
    """The layers' weights; ``prefix`` stands before their name, ``projections`` are those of a linear layer."""
    table: list[Rule] = []
    norms = [
        rule("input_layernorm.weight", "mixer_norm.weight"),
        rule("post_attention_layernorm.weight", "ff_norm.weight"),
    ]
    for i, (mixer, ff) in enumerate(zip(config.layers, config.feed_forwards, strict=True)):
        theirs, ours = f"{prefix}layers.{i}.", f"layers.{i}."
        table += under(theirs, ours, norms)
        if mixer == "attention":
            rules = parts.attention(config.options["attention"])
            table += under(f"{theirs}self_attn.", f"{ours}mixer.", rules)
        else:
            table += under(f"{theirs}linear_attn.", f"{ours}mixer.", linear_layer(projections))
        table += _feed_forward(config, ff, f"{theirs}mlp.", f"{ours}ff.", found)
    return table


def linear_layer(projections: Sequence[Rule]) -> list[Rule]:
    """A layer of Gated DeltaNet with these projections."""
    return [
        *projections,
        *parts.convolution("conv1d"),
        *(rule(name, name) for name in ("A_log", "dt_bias", "norm.weight", "out_proj.weight")),
    ]


def _feed_forward(
    config: ModelConfig, kind: str, theirs: str, ours: str, found: Collection[str]
) -> list[Rule]:
    """Dense, or a mixture with one shared expert and its gate."""
    if kind == "swiglu":
        return under(theirs, ours, parts.swiglu(config.d_ff or 0))
    options = config.options["experts"]
    routers = [
        rule("gate.weight", "router.weight"),
        rule("shared_expert_gate.weight", "shared_gate.weight"),
    ]
    return [
        *under(theirs, ours, routers),
        *under(f"{theirs}shared_expert.", f"{ours}shared.", parts.swiglu(options["shared_width"])),
        *under("", ours, parts.experts(found, f"{theirs}experts", options["num_experts"], options["d_ff"])),
    ]
