"""RWKV-4 as transformers keeps it.

Their mixing rates are those of the present token, ours those of the one before. ``rescale_every`` halves what the layers
hand on, and the weights that write into it, against an overflow of float16: the model stays the same.

Source: transformers ``models/rwkv``; RWKV-4 World and Raven.
"""

from __future__ import annotations

from collections.abc import Mapping

from linstate.models.config import ModelConfig
from linstate.models.families import _parts as parts
from linstate.models.families._rules import Complement, Reshape, Rule, Stack, Table, rule, under
from linstate.models.families._settings import Settings
from linstate.models.families.base import Family, Header


class RWKV(Family):
    """See the module."""

    model_types = ("rwkv",)
    mixers = ("rwkv4",)
    checked = "rescaled layers, width of the channel mix, tied head, batches"

    def config(self, settings: Settings) -> ModelConfig:
        width = settings.integer("hidden_size", 4096)
        settings.only("attention_hidden_size", width, default=width)
        settings.ignore("rescale_every", "context_length")
        return ModelConfig(
            settings.integer("vocab_size", 50277),
            width,
            ("rwkv4",) * settings.integer("num_hidden_layers", 32),
            d_ff=settings.integer("intermediate_size", 4 * width),
            tie_embeddings=settings.flag("tie_word_embeddings", False),
            norm="layernorm",
            norm_eps=settings.only("layer_norm_epsilon", 1e-5, default=1e-5),  # the last norm knows no other
            embedding_norm=True,
        )

    def weights(self, config: ModelConfig, settings: Settings, found: Mapping[str, Header]) -> Table:
        table = [
            *parts.ends(config.tie_embeddings, "rwkv.embeddings", "rwkv.ln_out", "head", bias=True),
            *parts.normed("rwkv.blocks.0.pre_ln", "embedding_norm", bias=True),
        ]
        for i in range(config.num_layers):
            theirs, ours = f"rwkv.blocks.{i}.", f"layers.{i}."
            table += under(theirs, ours, parts.normed("ln1", "mixer_norm", bias=True))
            table += under(theirs, ours, parts.normed("ln2", "ff_norm", bias=True))
            table += under(f"{theirs}attention.", f"{ours}mixer.", time_mix(config.d_model))
            table += under(f"{theirs}feed_forward.", f"{ours}ff.", channel_mix(config.d_model))
        return table


def rates(names: tuple[str, ...], d_model: int) -> Rule:
    """The mixing rates."""
    count = len(names)
    flat = Reshape((count, 1, 1, d_model), (count, d_model))
    return rule([f"time_mix_{name}" for name in names], "mix", Stack(), flat, Complement())


def time_mix(d_model: int) -> list[Rule]:
    """A layer's time mix."""
    return [
        rates(("key", "value", "receptance"), d_model),
        rule("time_decay", "decay"),
        rule("time_first", "bonus"),
        rule("key.weight", "k_proj.weight"),
        rule("value.weight", "v_proj.weight"),
        rule("receptance.weight", "r_proj.weight"),
        rule("output.weight", "out_proj.weight"),
    ]


def channel_mix(d_model: int) -> list[Rule]:
    """A layer's channel mix."""
    return [
        rates(("key", "receptance"), d_model),
        rule("key.weight", "up.weight"),
        rule("value.weight", "down.weight"),
        rule("receptance.weight", "receptance.weight"),
    ]
