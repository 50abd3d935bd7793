"""OLMo Hybrid: three layers of Gated DeltaNet with negative eigenvalues to one of attention, whose norms stand behind.

The attention has one norm over all heads of q and one of k, and no rotation where ``rope_theta`` is null (as in the
released models).

Source: transformers ``models/olmo_hybrid``.
"""

from __future__ import annotations

from collections.abc import Mapping

from linstate.models.config import ModelConfig
from linstate.models.families import _parts as parts
from linstate.models.families._rules import Concat, Rule, Squeeze, Table, rule, under
from linstate.models.families._settings import Settings
from linstate.models.families.base import Family, Header

KINDS = {"linear_attention": "gated_deltanet", "full_attention": "attention"}


class OlmoHybrid(Family):
    """See the module."""

    model_types = ("olmo_hybrid",)
    mixers = ("gated_deltanet", "attention")
    checked = "eigenvalues positive and negative, grouped heads, with and without rotation, biases, tied head"
    ignored = {r"mtp\.": "for predicting several tokens at once"}  # noqa: RUF012

    def config(self, settings: Settings) -> ModelConfig:
        layers, width = settings.integer("num_hidden_layers"), settings.integer("hidden_size")
        default = ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(layers)]
        if "full_attention" not in default:
            default[-1] = "full_attention"
        pattern = settings.listed("layer_types", KINDS, default, layers)
        settings.only("hidden_act", "silu", default="silu")
        settings.ignore(
            *("linear_a_log_min", "linear_a_log_max", "linear_dt_min", "linear_dt_max"),  # initial values
            "linear_dt_init_floor",
        )
        heads = settings.integer("num_attention_heads")
        keys = settings.integer("linear_num_key_heads", heads)
        k = settings.integer("linear_key_head_dim", int(0.75 * width / keys))
        eps = settings.number("rms_norm_eps", 1e-6)
        gated_deltanet = {
            "num_heads": keys,
            "head_dim": k,
            "num_v_heads": settings.integer("linear_num_value_heads", heads),
            "v_head_dim": settings.integer("linear_value_head_dim", 2 * k),
            "conv_width": settings.integer("linear_conv_kernel_dim", 4),
            "negative_eigenvalues": settings.flag("linear_allow_neg_eigval", True),
            "norm_eps": 1e-5,  # fixed in their layer
        }
        dim = settings.integer("head_dim", width // heads)
        attention = {
            "num_heads": heads,
            "num_kv_heads": settings.integer("num_key_value_heads", heads),
            "head_dim": dim,
            "rotary_base": rotary_base(settings),
            "qk_norm": "whole",
            "bias": settings.flag("attention_bias", False),
            "norm_eps": eps,
        }
        return ModelConfig(
            settings.integer("vocab_size"),
            width,
            pattern,
            options=parts.used(pattern, gated_deltanet=gated_deltanet, attention=attention),
            feed_forward="swiglu",
            d_ff=settings.integer("intermediate_size"),
            tie_embeddings=settings.flag("tie_word_embeddings", False),
            norm_eps=eps,
            norm_place={"attention": "after"} if "attention" in pattern else {},
        )

    def weights(self, config: ModelConfig, settings: Settings, found: Mapping[str, Header]) -> Table:
        table = [*parts.ends(config.tie_embeddings)]
        for i, mixer in enumerate(config.layers):
            theirs, ours = f"model.layers.{i}.", f"layers.{i}."
            table += under(f"{theirs}mlp.", f"{ours}ff.", parts.swiglu(config.d_ff or 0))
            if mixer == "attention":
                norms = "feedforward_layer_norm", "post_feedforward_layernorm"
                rules = parts.attention(config.options["attention"])
                table += under(f"{theirs}self_attn.", f"{ours}mixer.", rules)
            else:
                norms = "attention_layer_norm", "feedforward_layer_norm"
                rules = linear(config.options["gated_deltanet"], found, f"{theirs}linear_attn.")
                table += under(f"{theirs}linear_attn.", f"{ours}mixer.", rules)
            table += [
                rule(f"{theirs}{norms[0]}.weight", f"{ours}mixer_norm.weight"),
                rule(f"{theirs}{norms[1]}.weight", f"{ours}ff_norm.weight"),
            ]
        return table


def rotary_base(settings: Settings) -> float | None:
    """None where ``rope_theta`` stands there as null."""
    if settings.says_null("rope_parameters", "rope_theta"):
        settings.part("rope_parameters").ignore("rope_theta", "rope_type", "type", "partial_rotary_factor")
        return None
    rope = settings.rope()
    settings.one_part(rope)
    return rope.base


def linear(options: Mapping[str, int], found: Mapping[str, Header], prefix: str) -> list[Rule]:
    """A layer of Gated DeltaNet.

    transformers 5.23 writes the convolutions of q, k and v in three parts of the same size, whatever their sizes are.
    """
    keys, hv = options["num_heads"] * options["head_dim"], options["num_v_heads"]
    values = hv * options["v_head_dim"]
    sizes, whole = [keys, keys, values], 2 * keys + values
    third = -(-whole // 3)
    first = found.get(f"{prefix}q_conv1d.weight")
    if first is not None and first.shape[:1] == (third,):
        sizes = [third, third, whole - 2 * third]
    convolutions = [f"{part}_conv1d.weight" for part in "qkv"]
    projections = [f"{part}_proj.weight" for part in "qkvgba"]
    return [
        rule(projections, "in_proj.weight", Concat(keys, keys, values, values, hv, hv)),
        rule(convolutions, "conv.weight", Concat(*sizes), Squeeze(1)),
        rule("A_log", "A_log"),
        rule("dt_bias", "dt_bias"),
        rule("o_norm.weight", "norm.weight"),
        rule("o_proj.weight", "out_proj.weight"),
    ]
