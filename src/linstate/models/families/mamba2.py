"""Mamba-2: layers of SSD and nothing else; the residual stream may be kept in float32.

Source: transformers ``models/mamba2``; mistralai/Mamba-Codestral-7B-v0.1.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from linstate.models.config import ModelConfig
from linstate.models.families import _mamba
from linstate.models.families._rules import Table
from linstate.models.families._settings import Settings
from linstate.models.families.base import Family
from linstate.models.families.mamba import only_mixers, only_mixers_table

NAMES = _mamba.Names(
    "num_heads",
    "head_dim",
    "state_size",
    "n_groups",
    "conv_kernel",
    "chunk_size",
    "use_conv_bias",
    "use_bias",
)


class Mamba2(Family):
    """See the module."""

    model_types = ("mamba2",)
    mixers = ("mamba2",)
    checked = "grouped heads, limits of dt, tied and own head, residual stream in float32 or not"

    def accepts(self, raw: Mapping[str, Any]) -> bool:
        return super().accepts(raw) and "norm_eps" not in raw  # which FLA's configuration of this name has

    def config(self, settings: Settings) -> ModelConfig:
        settings.only("hidden_act", "silu", default="silu")
        settings.only("rms_norm", True, default=True)
        _mamba.initial(settings, "time_step_rank")
        settings.ignore("norm_before_gate")  # theirs does not look at it: the gate is before the norm
        eps, inner = settings.number("layer_norm_epsilon", 1e-5), _mamba.expanded(settings, "expand")
        options = _mamba.mamba2_mixer(settings, eps, inner, NAMES)
        limits = {"dt_limit": _mamba.limits(settings)}
        return only_mixers(settings, "mamba2", {**options, **limits}, tied=False)

    def weights(self, config: ModelConfig, settings: Settings, names: Collection[str]) -> Table:
        return only_mixers_table(config, _mamba.mamba2_rules())
