"""Linstate's own folders: the configuration stands under ``architecture``, the weights under our names.

They are what ``LanguageModel.save_pretrained`` and Hugging Face's ``save_pretrained`` of our models write.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from linstate.errors import CheckpointError
from linstate.models.config import ModelConfig
from linstate.models.decoder import Decoder
from linstate.models.families._rules import Table, rule, tied
from linstate.models.families._settings import Settings
from linstate.models.families.base import Family, Header


class Linstate(Family):
    """See the module."""

    model_types = ("linstate",)
    library = "linstate"
    mixers = ("any",)
    checked = "every mixer"

    def config(self, settings: Settings) -> ModelConfig:
        architecture = settings.take("architecture", None)
        if not isinstance(architecture, Mapping):
            raise CheckpointError(
                f"{settings.where} cannot be read: expected an object 'architecture', found {architecture!r}"
            )
        settings.ignore(
            "vocab_size", "hidden_size", "num_hidden_layers", "tie_word_embeddings"
        )  # of architecture
        return ModelConfig.from_dict(architecture)

    def weights(self, config: ModelConfig, settings: Settings, found: Mapping[str, Header]) -> Table:
        with torch.device("meta"):
            own = Decoder(config).state_dict()
        table = [
            rule(f"decoder.{name}", name)
            for name in own
            if not (config.tie_embeddings and name == "head.weight")
        ]
        copy = [tied("decoder.embedding.weight", "decoder.head.weight")] if config.tie_embeddings else []
        return [*table, *copy]
