"""Kimi Delta Attention as flash-linear-attention keeps it: every layer is one, and the output gate has a bias.

Source: fla ``models/kda``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from linstate.models.config import ModelConfig
from linstate.models.families import _fla
from linstate.models.families import _parts as parts
from linstate.models.families._rules import Rule, rule
from linstate.models.families._settings import Settings


class KDA(_fla.FLAFamily):
    """See the module."""

    model_types = ("kda",)
    mixers = ("kimi_delta",)
    checked = "width of values, negative eigenvalues, width of the convolution, tied head"

    def config(self, settings: Settings) -> ModelConfig:
        settings.only("use_short_conv", True, default=True)
        settings.only("safe_gate", False, default=False)
        settings.only("lower_bound", None)
        heads = settings.integer("num_heads", 16)
        settings.only("num_v_heads", heads, default=heads)
        options = {
            **_fla.heads_of(settings, heads, 128, 1.0),
            "conv_width": settings.integer("conv_size", 4),
            "negative_eigenvalues": settings.flag("allow_neg_eigval", False),
            "norm_eps": settings.number("norm_eps", 1e-6),
            "gate_bias": True,
        }
        return self.model(settings, options)

    def mixer_rules(
        self, options: Mapping[str, Any], config: ModelConfig, settings: Settings, layer: int
    ) -> list[Rule]:
        keys, values = _fla.inner(options)
        rank, heads = options["v_head_dim"], options["num_heads"]
        names = ("q_proj", "k_proj", "v_proj", "b_proj", "f_proj.0", "g_proj.0")
        return [
            _fla.projections(names, (keys, keys, values, heads, rank, rank)),
            _fla.convolutions(keys, values),
            rule("f_proj.1.weight", "decay_proj.weight"),
            rule("g_proj.1.weight", "gate_proj.weight"),
            rule("g_proj.1.bias", "gate_proj.bias"),
            rule("A_log", "A_log"),
            rule("dt_bias", "dt_bias"),
            *parts.normed("o_norm", "norm"),
            rule("o_proj.weight", "out_proj.weight"),
        ]
