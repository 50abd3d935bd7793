"""Falcon-Mamba: Mamba with an RMS norm without a weight on dt, B and C.

Source: transformers ``models/falcon_mamba``; tiiuae/falcon-mamba-7b. Their code forgets the state of the scan when it
goes on by more than one token.
"""

from __future__ import annotations

from collections.abc import Collection

from linstate.models.config import ModelConfig
from linstate.models.families import _mamba
from linstate.models.families._rules import Table
from linstate.models.families._settings import Settings
from linstate.models.families.base import Family
from linstate.models.families.mamba import only_mixers, only_mixers_table


class FalconMamba(Family):
    """See the module."""

    model_types = ("falcon_mamba",)
    mixers = ("mamba",)
    checked = "dt rank, eps of the norms, tied and own head, residual stream in float32 or not"

    def config(self, settings: Settings) -> ModelConfig:
        norms = {"norm": "srmsnorm", "norm_eps": settings.number("mixer_rms_eps", 1e-6)}
        return only_mixers(settings, "mamba", {**_mamba.mamba_mixer(settings), **norms})

    def weights(self, config: ModelConfig, settings: Settings, names: Collection[str]) -> Table:
        return only_mixers_table(config, _mamba.mamba_rules())
