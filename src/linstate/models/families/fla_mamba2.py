"""Mamba-2 as flash-linear-attention keeps it: its configuration has the model type of transformers', and other settings.

Source: fla ``models/mamba2``; fla-hub/mamba2-1.3B-100B.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from linstate.mixers.base import divide
from linstate.models.config import ModelConfig
from linstate.models.families import _mamba
from linstate.models.families._rules import Table
from linstate.models.families._settings import Settings
from linstate.models.families.base import Family, Header
from linstate.models.families.mamba import only_mixers_table


class FLAMamba2(Family):
    """See the module."""

    model_types = ("mamba2",)
    library = "fla"
    mixers = ("mamba2",)
    checked = "grouped heads, limits of dt, no norm, norm before the gate, tied head"

    def accepts(self, raw: Mapping[str, Any]) -> bool:
        return super().accepts(raw) and "norm_eps" in raw

    def config(self, settings: Settings) -> ModelConfig:
        settings.only("hidden_act", "silu", "swish", default="silu")
        settings.only("use_bias", False, default=False)
        settings.only("use_conv_bias", True, default=True)
        settings.only("D_has_hdim", False, default=False)
        # of initial values, kernels, losses; and theirs rounds the residual stream behind each layer all the same
        settings.ignore(
            "conv_init", "A_init_range", "dt_min", "dt_max", "dt_init_floor", "rescale_prenorm_residual"
        )
        settings.ignore(
            "chunk_size", "fuse_norm", "fuse_cross_entropy", "fuse_linear_cross_entropy", "use_l2warp"
        )
        settings.ignore("residual_in_fp32")
        width, eps = settings.integer("hidden_size", 2048), settings.number("norm_eps", 1e-5)
        dim, inner = settings.integer("head_dim", 64), int(settings.number("expand", 2) * width)
        heads = divide(inner, dim, "expand * hidden_size into heads of head_dim")
        _mamba.held(settings, "num_heads", heads)
        norm, before = settings.flag("rmsnorm", True), settings.flag("norm_before_gate", False)
        options = {
            "num_heads": heads,
            "head_dim": dim,
            "state_size": settings.integer("state_size", 128),
            "num_groups": settings.integer("n_groups", 1),
            "conv_width": settings.integer("conv_kernel", 4),
            "dt_limit": _mamba.limits(settings, "dt_limit"),
            "norm": norm,
            "norm_eps": eps,
            "norm_before_gate": before,
        }
        return ModelConfig(
            settings.integer("vocab_size", 32000),
            width,
            ("mamba2",) * settings.integer("num_hidden_layers", 48),
            options={"mamba2": options},
            feed_forward="none",
            tie_embeddings=settings.flag("tie_word_embeddings", False),
            norm_eps=eps,
        )

    def weights(self, config: ModelConfig, settings: Settings, found: Mapping[str, Header]) -> Table:
        return only_mixers_table(config, _mamba.mamba2_rules(norm=config.options["mamba2"]["norm"]))
