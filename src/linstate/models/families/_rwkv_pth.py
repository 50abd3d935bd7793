"""What the authors' files of RWKV-6 and RWKV-7 share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from linstate.models.config import ModelConfig
from linstate.models.families import _parts as parts
from linstate.models.families._rules import Reshape, Rule, Table, rule, under
from linstate.models.families._settings import Settings
from linstate.models.families.base import Family, Header


class PthFamily(Family):
    """A ``.pth``; its settings are those that :func:`linstate.models.pth.settings_of` makes of names and shapes."""

    library = "RWKV-LM"
    ranks: ClassVar[tuple[str, ...]]

    def config(self, settings: Settings) -> ModelConfig:
        (mixer,) = self.mixers
        options = {name: settings.integer(name) for name in ("num_heads", "head_dim", *self.ranks)}
        return ModelConfig(
            settings.integer("vocab_size"),
            settings.integer("hidden_size"),
            (mixer,) * settings.integer("num_hidden_layers"),
            options={mixer: {**options, "norm_eps": 64e-5}},
            d_ff=settings.integer("intermediate_size"),
            tie_embeddings=False,
            norm="layernorm",
            norm_eps=1e-5,
            embedding_norm=True,
        )

    def weights(self, config: ModelConfig, settings: Settings, found: Mapping[str, Header]) -> Table:
        (mixer,) = self.mixers
        table = [
            *parts.ends(False, "emb", "ln_out", "head", bias=True),
            *parts.normed("blocks.0.ln0", "embedding_norm", bias=True),
        ]
        for i in range(config.num_layers):
            theirs, ours = f"blocks.{i}.", f"layers.{i}."
            table += under(theirs, ours, parts.normed("ln1", "mixer_norm", bias=True))
            table += under(theirs, ours, parts.normed("ln2", "ff_norm", bias=True))
            table += under(f"{theirs}att.", f"{ours}mixer.", self.time_mix(config.options[mixer], config, i))
            table += under(f"{theirs}ffn.", f"{ours}ff.", self.channel_mix(config))
        return table

    @abstractmethod
    def time_mix(self, options: Mapping[str, Any], config: ModelConfig, layer: int) -> list[Rule]:
        """The time mix of a layer."""

    @abstractmethod
    def channel_mix(self, config: ModelConfig) -> list[Rule]:
        """The channel mix of a layer."""


def vector(theirs: str, ours: str, size: int) -> Rule:
    """A number for each channel, which they keep as ``[1, 1, D]``."""
    return rule(theirs, ours, Reshape((1, 1, size), (size,)))
