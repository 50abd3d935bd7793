"""Zamba2: layers of Mamba-2, of which some read a transformer block that they share, with adapters of each use's own.

Their Mamba-2 keeps dt above ``time_step_min`` when it reads more than one token, and not when it reads one; ours always.

Source: transformers ``models/zamba2``; Zyphra/Zamba2-2.7B.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor

from linstate.errors import ConfigError
from linstate.models.config import ModelConfig
from linstate.models.families import _mamba
from linstate.models.families import _parts as parts
from linstate.models.families._rules import Read, Redundant, Rule, Table, rule, under
from linstate.models.families._settings import Settings
from linstate.models.families.base import Family

NAMES = _mamba.Names(
    "n_mamba_heads",
    "mamba_headdim",
    "mamba_d_state",
    "mamba_ngroups",
    "mamba_d_conv",
    "chunk_size",
    "use_conv_bias",
    "add_bias_linear",
)
KINDS = {"linear_attention": False, "mamba": False, "hybrid": True}
DEFAULT = (
    *("linear_attention",) * 6,
    *("hybrid", *("linear_attention",) * 5) * 6,
    "hybrid",
    *("linear_attention",) * 4,
    "hybrid",
    *("linear_attention",) * 3,
    "hybrid",
    *("linear_attention",) * 2,
)


class Zamba2(Family):
    """See the module."""

    model_types = ("zamba2",)
    mixers = ("mamba2", "attention")
    checked = "one and two shared blocks, adapters of attention on and off, rotary on and off, grouped heads, bounds of dt"

    def config(self, settings: Settings) -> ModelConfig:
        layers, width = settings.integer("num_hidden_layers"), settings.integer("hidden_size")
        hybrid = settings.listed("layers_block_type", KINDS, DEFAULT, layers)
        uses = [i for i, shares in enumerate(hybrid) if shares]
        inner = _mamba.expanded(settings)
        settings.only("add_bias_linear", False, default=False)
        settings.only("use_long_context", False, default=False)
        settings.only("use_shared_mlp_adapter", True, default=True)
        _mamba.held(settings, "hybrid_layer_ids", uses)
        _mamba.held(settings, "attention_hidden_size", 2 * width)
        _mamba.initial(settings, "use_mem_eff_path", "kv_channels", "num_query_groups")
        d_ff = settings.integer("intermediate_size", 4 * width)
        _mamba.held(settings, "ffn_hidden_size", d_ff)
        mamba2 = _mamba.mamba2_mixer(settings, 1e-5, inner, NAMES)
        bound = (settings.number("time_step_min", 0.001), None)
        shared = {
            "layers": uses,
            "blocks": min(settings.integer("num_mem_blocks", 1), len(uses)),
            "rank": settings.integer("adapter_rank", 128),
            "adapt_attention": settings.flag("use_shared_attention_adapter", False),
            "activation": settings.only("hidden_act", "gelu", default="gelu"),
            "d_ff": d_ff,
            "attention": attention(settings, 2 * width),
        }
        return ModelConfig(
            settings.integer("vocab_size"),
            width,
            ("mamba2",) * layers,
            options={"mamba2": {**mamba2, "dt_limit": bound}},
            feed_forward="none",
            tie_embeddings=settings.flag("tie_word_embeddings", True),
            norm_eps=settings.number("rms_norm_eps", 1e-5),
            shared_blocks=shared if uses else None,
        )

    def weights(self, config: ModelConfig, settings: Settings, names: Collection[str]) -> Table:
        table = [*parts.ends(config.tie_embeddings, norm="model.final_layernorm")]
        uses = dict((config.shared_blocks or {}).items()).get("layers", [])
        for i in range(config.num_layers):
            theirs, ours = f"model.layers.{i}.", f"layers.{i}."
            if i in uses:
                use = f"shared_blocks.own.{uses.index(i)}."
                table.append(rule(f"{theirs}linear.weight", f"{use}out_proj.weight"))
                theirs += "mamba_decoder."
            table.append(rule(f"{theirs}input_layernorm.weight", f"{ours}mixer_norm.weight"))
            table += under(f"{theirs}mamba.", f"{ours}mixer.", _mamba.mamba2_rules())
        if config.shared_blocks is not None:
            table += shared_table(config.shared_blocks, names)
        return table


def attention(settings: Settings, width: int) -> dict[str, Any]:
    """Options of the attention of the shared blocks, which reads ``width`` channels. Raises ConfigError."""
    heads = settings.integer("num_attention_heads", 32)
    dim = settings.integer("attention_head_dim", width // heads)
    if heads * dim != width:
        raise ConfigError(
            f"{settings.where}: num_attention_heads * attention_head_dim must be {width}, found {heads} * {dim}"
        )
    options = {
        "num_heads": heads,
        "num_kv_heads": settings.integer("num_key_value_heads", heads),
        "head_dim": dim,
        "rotary_base": None,
        "scale": (dim / 2) ** -0.5,
    }
    turned = _mamba.rotated(settings, options)
    if settings.flag("use_mem_rope", False):
        return turned
    settings.ignore("rope_theta", "partial_rotary_factor")
    return options


def shared_table(options: Any, names: Collection[str]) -> Table:
    """The shared blocks: the layers that first use one hold its weights, and the adapters of all of its uses.

    Older files hold the same tensors again in every layer that uses the block.
    """
    table: list[Rule | Redundant] = []
    count, layers = options["blocks"], options["layers"]
    for block, first in enumerate(layers[:count]):
        theirs = f"model.layers.{first}.shared_transformer."
        rules = under(theirs, f"shared_blocks.blocks.{block}.", block_rules(options["attention"]))
        for use in range(block, len(layers), count):
            rules += under(theirs, f"shared_blocks.own.{use}.", use_rules(options, use))
        table += rules
        for layer in layers[block + count :: count]:
            again = f"model.layers.{layer}.shared_transformer."
            copies = {again + name.removeprefix(theirs): name for r in rules for name in r.theirs}
            table += [same(copy, name) for copy, name in copies.items() if copy in names]
    return table


def same(copy: str, name: str) -> Redundant:
    """A second copy of a tensor."""

    def value(read: Read) -> Tensor:
        return read(name)

    return Redundant(copy, value, written=False)


def block_rules(attention: Any) -> list[Rule]:
    """What all uses of a block share."""
    return [
        rule("input_layernorm.weight", "norm.weight"),
        *under("self_attn.", "attention.", parts.attention(attention)),
        rule("pre_ff_layernorm.weight", "ff_norm.weight"),
        rule("feed_forward.gate_up_proj.weight", "ff.up.weight"),
        rule("feed_forward.down_proj.weight", "ff.down.weight"),
    ]


def use_rules(options: Any, use: int) -> list[Rule]:
    """The adapters of one use."""
    pairs = {f"feed_forward.gate_up_proj_adapter_list.{use}.": "ff."}
    if options["adapt_attention"]:
        pairs |= {
            f"self_attn.linear_{part}_adapter_list.{use}.": f"attention.{i}." for i, part in enumerate("qkv")
        }
    low_rank = [rule("0.weight", "narrow.weight"), rule("1.weight", "widen.weight")]
    return [made for theirs, ours in pairs.items() for made in under(theirs, ours, low_rank)]
