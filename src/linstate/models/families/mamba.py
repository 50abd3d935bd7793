"""Mamba: layers of S6 and nothing else; the residual stream may be kept in float32.

Source: transformers ``models/mamba``; state-spaces/mamba-2.8b-hf. Their code forgets the state of the scan when it goes
on by more than one token.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from linstate.models.config import ModelConfig
from linstate.models.families import _mamba, _parts
from linstate.models.families._rules import Rule, Table, rule, under
from linstate.models.families._settings import Settings
from linstate.models.families.base import Family


class Mamba(Family):
    """See the module."""

    model_types = ("mamba",)
    mixers = ("mamba",)
    checked = "dt rank, tied and own head, residual stream in float32 or not"

    def config(self, settings: Settings) -> ModelConfig:
        settings.only("ssm_cfg", {}, default={})
        _mamba.held(settings, "d_model", settings.integer("hidden_size"))
        _mamba.held(settings, "n_layer", settings.integer("num_hidden_layers"))
        options = _mamba.mamba_mixer(settings)
        _mamba.held(settings, "d_inner", options["expand"] * settings.integer("hidden_size"))
        return only_mixers(settings, "mamba", options)

    def weights(self, config: ModelConfig, settings: Settings, names: Collection[str]) -> Table:
        embedding = "backbone.embedding"  # of the original release
        if f"{embedding}.weight" not in names:
            embedding = "backbone.embeddings"
        return only_mixers_table(config, _mamba.mamba_rules(), embedding)


def only_mixers(settings: Settings, mixer: str, options: Mapping[str, Any], tied: bool = True) -> ModelConfig:
    """A model whose layers are this mixer, without feed-forwards; ``tied`` is what their head is unless they say."""
    return ModelConfig(
        settings.integer("vocab_size"),
        settings.integer("hidden_size"),
        (mixer,) * settings.integer("num_hidden_layers"),
        options={mixer: options},
        feed_forward="none",
        tie_embeddings=settings.flag("tie_word_embeddings", tied),
        norm_eps=settings.number("layer_norm_epsilon", 1e-5),
        residual_in_fp32=settings.flag("residual_in_fp32", True),
    )


def only_mixers_table(
    config: ModelConfig, rules: list[Rule], embedding: str = "backbone.embeddings"
) -> Table:
    """Its weights, with these rules for each mixer."""
    table = [*_parts.ends(config.tie_embeddings, embedding, "backbone.norm_f")]
    for i in range(config.num_layers):
        theirs, ours = f"backbone.layers.{i}.", f"layers.{i}."
        table.append(rule(f"{theirs}norm.weight", f"{ours}mixer_norm.weight"))
        table += under(f"{theirs}mixer.", f"{ours}mixer.", rules)
    return table
