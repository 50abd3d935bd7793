"""Mamba-2: what its configurations can say."""

from __future__ import annotations

import math
from typing import Any

import pytest

from families.cases import hf
from linstate.errors import ConfigError
from linstate.models.families._mamba import limits
from linstate.models.families._settings import Settings

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "state_size": 8,
    "num_heads": 4,
    "head_dim": 16,
    "n_groups": 1,
    "chunk_size": 32,
}
CASES = [
    hf("mamba2", "mamba2", **TINY),
    hf(
        "mamba2-groups-limits-tied",
        "mamba2",
        seed=1,
        **{
            **TINY,
            "n_groups": 2,
            "time_step_limit": (0.05, 0.2),
            "tie_word_embeddings": True,
            "residual_in_fp32": False,
        },
    ),
]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ([0.0, math.inf], None),
        ([0, {"__float__": "Infinity"}], None),
        ([0.05, {"__float__": "Infinity"}], (0.05, None)),
        ([0, 0.2], (0.0, 0.2)),
    ],
)
def test_the_bounds_of_dt(written: list[Any], meant: tuple[float, float | None] | None) -> None:
    assert limits(Settings({"time_step_limit": written}, "config.json")) == meant


@pytest.mark.parametrize("written", [3, [1], [0, 1, 2], ["a", 1], [{"__float__": 3}, 1]])
def test_what_is_no_bound_is_refused(written: Any) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: time_step_limit must be two numbers, found"):
        limits(Settings({"time_step_limit": written}, "config.json"))
