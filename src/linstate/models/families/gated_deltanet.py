"""Gated DeltaNet as flash-linear-attention keeps it.

Source: fla ``models/gated_deltanet``; m-a-p/1.3B-100B-GatedDeltaNet-pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from linstate.models.config import ModelConfig
from linstate.models.families import _fla
from linstate.models.families import _parts as parts
from linstate.models.families._rules import Rule, rule
from linstate.models.families._settings import Settings


class GatedDeltaNet(_fla.FLAFamily):
    """See the module."""

    model_types = ("gated_deltanet",)
    mixers = ("gated_deltanet",)
    checked = "grouped heads, width of values, negative eigenvalues, width of the convolution, tied head"

    def config(self, settings: Settings) -> ModelConfig:
        settings.only("use_gate", True, default=True)
        settings.only("use_short_conv", True, default=True)
        settings.only("output_gate_activation", "swish", "silu", default="swish")
        heads = settings.integer("num_heads", 6)
        options = {
            **_fla.heads_of(settings, heads, 256, 2.0),
            "num_v_heads": settings.integer("num_v_heads", heads),
            "conv_width": settings.integer("conv_size", 4),
            "negative_eigenvalues": settings.flag("allow_neg_eigval", False),
            "norm_eps": settings.number("norm_eps", 1e-6),
        }
        return self.model(settings, options)

    def mixer_rules(
        self, options: Mapping[str, Any], config: ModelConfig, settings: Settings, layer: int
    ) -> list[Rule]:
        keys, values = _fla.inner(options)
        of_heads = options["num_v_heads"]
        names = ("q_proj", "k_proj", "v_proj", "g_proj", "b_proj", "a_proj")
        return [
            _fla.projections(names, (keys, keys, values, values, of_heads, of_heads)),
            _fla.convolutions(keys, values),
            rule("A_log", "A_log"),
            rule("dt_bias", "dt_bias"),
            *parts.normed("o_norm", "norm"),
            rule("o_proj.weight", "out_proj.weight"),
        ]
