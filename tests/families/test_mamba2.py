"""Mamba-2: what its configurations can say."""

from __future__ import annotations

from typing import Any

from families.cases import hf

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
