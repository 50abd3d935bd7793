"""Mamba: what its configurations can say."""

from __future__ import annotations

from typing import Any

from families.cases import hf

DT = {"A_log": lambda u: 2 * u - 2, "dt_proj.bias": lambda u: 2 * u - 4}
TINY: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 6}
CASES = [
    hf("mamba", "mamba", values=DT, **TINY),
    hf(
        "mamba-own-head",
        "mamba",
        values=DT,
        seed=1,
        **{**TINY, "tie_word_embeddings": False, "time_step_rank": 3, "expand": 3, "residual_in_fp32": False},
    ),
]
