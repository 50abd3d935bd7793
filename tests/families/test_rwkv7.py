"""RWKV-7 in FLA's format: what its configurations can say."""

from __future__ import annotations

from typing import Any

from families.cases import fla

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "head_dim": 16,
    "decay_low_rank_dim": 8,
    "gate_low_rank_dim": 12,
    "a_low_rank_dim": 6,
    "v_low_rank_dim": 4,
}
RATES: dict[str, Any] = {f"x_{name}": lambda u: u for name in "rwkvag"}
VALUES = {**RATES, "w_lora.lora.2.bias": lambda u: 3 * u - 3}
CASES = [
    fla("rwkv7", "rwkv7", values=VALUES, **TINY),
    fla(
        "rwkv7-heads-tied",
        "rwkv7",
        seed=1,
        values=VALUES,
        embedding=0.3,
        **{
            **TINY,
            "head_dim": None,
            "num_heads": 4,
            "intermediate_size": 48,
            "norm_first": False,
            "fuse_norm": False,
            "norm_eps": 1e-4,
            "tie_word_embeddings": True,
        },
    ),
]
