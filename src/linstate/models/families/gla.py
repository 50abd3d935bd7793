"""Gated linear attention (GLA) as flash-linear-attention keeps it.

Source: fla ``models/gla``; fla-hub/gla-1.3B-100B.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from linstate.models.config import ModelConfig
from linstate.models.families import _fla
from linstate.models.families import _parts as parts
from linstate.models.families._rules import Rule, rule
from linstate.models.families._settings import Settings


class GLA(_fla.FLAFamily):
    """See the module."""

    model_types = ("gla",)
    mixers = ("gla",)
    checked = "widths of keys and values, fused norms or not, tied head"

    def config(self, settings: Settings) -> ModelConfig:
        options = _fla.expanded(settings, 4, 0.5, 1.0)
        _fla.plain(settings, options["num_heads"])
        settings.only("clamp_min", None)
        settings.only("use_gk", True, default=True)
        settings.only("use_gv", False, default=False)
        return self.model(settings, {**options, "norm_eps": settings.number("norm_eps", 1e-6)})

    def mixer_rules(
        self, options: Mapping[str, Any], config: ModelConfig, settings: Settings, layer: int
    ) -> list[Rule]:
        keys, values = _fla.inner(options)
        return [
            _fla.projections(("q_proj", "k_proj", "v_proj", "g_proj"), (keys, keys, values, values)),
            rule("gk_proj.0.weight", "decay_proj.narrow.weight"),
            rule("gk_proj.1.weight", "decay_proj.widen.weight"),
            rule("gk_proj.1.bias", "decay_proj.widen.bias"),
            *parts.normed(_fla.gated_norm(settings), "norm"),
            rule("o_proj.weight", "out_proj.weight"),
        ]
