"""DeltaNet as flash-linear-attention keeps it.

Source: fla ``models/delta_net``; fla-hub/delta_net-1.3B-100B.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from linstate.models.config import ModelConfig
from linstate.models.families import _fla
from linstate.models.families import _parts as parts
from linstate.models.families._rules import Rule, rule
from linstate.models.families._settings import Settings


class DeltaNet(_fla.FLAFamily):
    """See the module."""

    model_types = ("delta_net",)
    mixers = ("deltanet",)
    checked = "widths of keys and values, negative eigenvalues, width of the convolution, tied head"

    def config(self, settings: Settings) -> ModelConfig:
        settings.only("use_gate", False, default=False)
        settings.only("use_beta", True, default=True)
        settings.only("use_short_conv", True, default=True)
        settings.only("use_output_norm", True, default=True)
        settings.only("share_conv_kernel", False, default=False)  # of older files, as the next two
        settings.only("use_rope", False, default=False)
        settings.only("use_elu", False, default=False)
        settings.only("qk_norm", "l2", default="l2")
        settings.only("qk_activation", "silu", default="silu")
        options = {
            **_fla.expanded(settings, 16, 1.0, 1.0),
            "conv_width": settings.integer("conv_size", 4),
            "negative_eigenvalues": settings.flag("allow_neg_eigval", False),
            "norm_eps": settings.number("norm_eps", 1e-6),
        }
        return self.model(settings, options)

    def mixer_rules(
        self, options: Mapping[str, Any], config: ModelConfig, settings: Settings, layer: int
    ) -> list[Rule]:
        keys, values = _fla.inner(options)
        names, sizes = ("q_proj", "k_proj", "v_proj", "b_proj"), (keys, keys, values, options["num_heads"])
        return [
            _fla.projections(names, sizes),
            _fla.convolutions(keys, values),
            *parts.normed("o_norm", "norm"),
            rule("o_proj.weight", "out_proj.weight"),
        ]
