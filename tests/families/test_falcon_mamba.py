"""Falcon-Mamba: what its configurations can say."""

from __future__ import annotations

from typing import Any

from families.cases import hf
from families.test_mamba import DT

TINY: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 6}
CASES = [
    hf("falcon_mamba", "falcon_mamba", values=DT, **TINY),
    hf(
        "falcon_mamba-own-head",
        "falcon_mamba",
        values=DT,
        seed=1,
        **{
            **TINY,
            "tie_word_embeddings": False,
            "time_step_rank": 3,
            "mixer_rms_eps": 1e-2,
            "residual_in_fp32": False,
        },
    ),
]
