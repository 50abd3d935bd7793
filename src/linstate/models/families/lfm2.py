"""LFM2: gated short convolutions, and softmax attention in some layers.

Source: transformers ``models/lfm2``; Liquid AI 2025.
"""

from __future__ import annotations

from collections.abc import Mapping

from linstate.models.config import ModelConfig
from linstate.models.families import _parts as parts
from linstate.models.families._rules import Rule, Table, rule, under
from linstate.models.families._settings import Settings
from linstate.models.families.base import Family, Header

KINDS = {"conv": "short_convolution", "full_attention": "attention"}


class LFM2(Family):
    """See the module."""

    model_types = ("lfm2",)
    mixers = ("short_convolution", "attention")
    checked = "grouped heads, biases of the convolutions, width of the feed-forward adjusted and not, head tied and not"

    def config(self, settings: Settings) -> ModelConfig:
        layers, width = settings.integer("num_hidden_layers"), settings.integer("hidden_size")
        full = settings.take("full_attn_idxs", list(range(layers)))
        default = ["full_attention" if i in full else "conv" for i in range(layers)]
        pattern = settings.listed("layer_types", KINDS, default, layers)
        if settings.has("layer_types"):
            settings.ignore("full_attn_idxs")  # layer_types says it
        heads, rope, eps = (
            settings.integer("num_attention_heads"),
            settings.rope(1e6),
            settings.number("norm_eps", 1e-5),
        )
        settings.one_part(rope)
        self._published(settings, width, heads, eps)
        attention = {
            "num_heads": heads,
            "num_kv_heads": settings.integer("num_key_value_heads", heads),
            "head_dim": settings.integer("head_dim", width // heads),
            "rotary_base": rope.base,
            "qk_norm": True,
            "norm_eps": eps,
        }
        convolution = {
            "width": settings.integer("conv_L_cache", 3),
            "bias": settings.flag("conv_bias", False),
        }
        return ModelConfig(
            settings.integer("vocab_size"),
            width,
            pattern,
            options=parts.used(pattern, short_convolution=convolution, attention=attention),
            feed_forward="swiglu",
            d_ff=feed_forward_width(settings),
            tie_embeddings=settings.flag("tie_embedding", settings.flag("tie_word_embeddings", True)),
            norm_eps=eps,
        )

    def _published(self, settings: Settings, width: int, heads: int, eps: float) -> None:
        """What published configurations say beside that: the same in other words, or initial values."""
        for name in ("block_dim", "conv_dim", "conv_dim_out"):
            settings.only(name, width, default=width)
        settings.only("num_heads", heads, default=heads)
        settings.only("block_norm_eps", eps, default=eps)
        settings.only("block_use_swiglu", True, default=True)
        settings.only("use_pos_enc", True, default=True)
        settings.ignore("block_mlp_init_scale", "block_out_init_scale", "block_use_xavier_init")
        settings.ignore("conv_use_xavier_init")

    def weights(self, config: ModelConfig, settings: Settings, found: Mapping[str, Header]) -> Table:
        table = [*parts.ends(config.tie_embeddings, norm="model.embedding_norm")]
        for i, mixer in enumerate(config.layers):
            theirs, ours = f"model.layers.{i}.", f"layers.{i}."
            options = config.options[mixer]
            if mixer == "attention":
                rules = parts.attention(options, out="out_proj", norms=("q_layernorm", "k_layernorm"))
                table += under(f"{theirs}self_attn.", f"{ours}mixer.", rules)
            else:
                table += under(f"{theirs}conv.", f"{ours}mixer.", convolution(bias=options["bias"]))
            table += [
                rule(f"{theirs}operator_norm.weight", f"{ours}mixer_norm.weight"),
                rule(f"{theirs}ffn_norm.weight", f"{ours}ff_norm.weight"),
                *under(
                    f"{theirs}feed_forward.", f"{ours}ff.", parts.swiglu(config.d_ff or 0, "w1", "w3", "w2")
                ),
            ]
        return table


def feed_forward_width(settings: Settings) -> int:
    """Two thirds of what is given, times a factor, rounded up: where it is to be adjusted."""
    width = settings.integer("block_ff_dim", settings.integer("intermediate_size", 12288))
    factor, multiple = (
        settings.take("block_ffn_dim_multiplier", None),
        settings.integer("block_multiple_of", 256),
    )
    if not settings.flag("block_auto_adjust_ff_dim", True):
        settings.ignore("block_ffn_dim_multiplier", "block_multiple_of")
        return width
    width = int(2 * width / 3)
    if factor is None:
        settings.ignore("block_multiple_of")
        return width
    width = int(settings.number("block_ffn_dim_multiplier") * width)
    return multiple * -(-width // multiple)


def convolution(*, bias: bool) -> list[Rule]:
    """A layer of gated short convolution."""
    kinds = ("weight", "bias") if bias else ("weight",)
    projections = [rule(f"{n}.{kind}", f"{n}.{kind}") for n in ("in_proj", "out_proj") for kind in kinds]
    return [*projections, *parts.convolution("conv", bias=bias)]
