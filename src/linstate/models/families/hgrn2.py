"""HGRN2 as flash-linear-attention keeps it.

Theirs scales q by ``1 / sqrt K``, which only the eps of the norm behind can see: ours is K times theirs. That one is
1e-5 in FLA 0.6, whatever the configuration says: ``norm_eps`` does not reach it.

Source: fla ``models/hgrn2``; fla-hub/hgrn2-1.3B-100B.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from linstate.errors import ConfigError
from linstate.mixers.base import divide
from linstate.models.config import ModelConfig
from linstate.models.families import _fla
from linstate.models.families import _parts as parts
from linstate.models.families._rules import Rule, Table, rule
from linstate.models.families._settings import Settings
from linstate.models.families.base import Header


class HGRN2(_fla.FLAFamily):
    """See the module."""

    model_types = ("hgrn2",)
    mixers = ("hgrn2",)
    checked = "number or width of heads, lower bounds, tied head"

    def config(self, settings: Settings) -> ModelConfig:
        settings.only("use_short_conv", False, default=False)
        settings.ignore("conv_size", "share_conv_kernel")  # of a convolution that is not there
        settings.only("use_lower_bound", True, default=True)
        settings.only("elementwise_affine", True, default=True)
        width = settings.integer("hidden_size", 2048)
        if settings.has("expand_ratio"):
            dim = settings.integer("expand_ratio")
            heads = divide(width, dim, "hidden_size into heads of expand_ratio")
            settings.ignore("num_heads")
        else:
            heads = settings.integer("num_heads")
            dim = divide(width, heads, "hidden_size into num_heads")
        if settings.integer("num_hidden_layers", 24) < 2:
            raise ConfigError(
                f"{settings.where}: num_hidden_layers must be at least 2: one layer has no lower bound"
            )
        return self.model(settings, {"num_heads": heads, "head_dim": dim, "norm_eps": dim * 1e-5})

    def weights(self, config: ModelConfig, settings: Settings, found: Mapping[str, Header]) -> Table:
        bounds = rule("model.lower_bounds", "layers.0.mixer.floor.gamma")
        return [*super().weights(config, settings, found), bounds]

    def mixer_rules(
        self, options: Mapping[str, Any], config: ModelConfig, settings: Settings, layer: int
    ) -> list[Rule]:
        return layer_rules(options["num_heads"] * options["head_dim"])


def layer_rules(inner: int) -> list[Rule]:
    """The mixer of a layer with that many channels."""
    return [
        _fla.projections(("q_proj", "f_proj", "i_proj"), (inner, inner, inner)),
        *parts.normed("g_norm", "norm"),
        rule("o_proj.weight", "out_proj.weight"),
    ]
