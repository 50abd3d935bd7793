"""RetNet as flash-linear-attention keeps it: an RMS norm on each head in place of the paper's group norm.

Source: fla ``models/retnet``; fla-hub/retnet-1.3B-100B.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from linstate.models.config import ModelConfig
from linstate.models.families import _fla
from linstate.models.families import _parts as parts
from linstate.models.families._rules import Rule, rule
from linstate.models.families._settings import Settings


class RetNet(_fla.FLAFamily):
    """See the module."""

    model_types = ("retnet",)
    mixers = ("retnet",)
    checked = "widths of keys and values, fused norms or not, tied head"
    ratio = 2

    def config(self, settings: Settings) -> ModelConfig:
        options = _fla.expanded(settings, 8, 1.0, 2.0)
        _fla.plain(settings, options["num_heads"])
        eps = settings.number("norm_eps", 1e-6)
        return self.model(settings, {**options, "norm": "rmsnorm", "norm_eps": eps})

    def mixer_rules(
        self, options: Mapping[str, Any], config: ModelConfig, settings: Settings, layer: int
    ) -> list[Rule]:
        keys, values = _fla.inner(options)
        return [
            _fla.projections(("q_proj", "k_proj", "v_proj", "g_proj"), (keys, keys, values, values)),
            *parts.normed(_fla.gated_norm(settings), "norm"),
            rule("o_proj.weight", "out_proj.weight"),
        ]
