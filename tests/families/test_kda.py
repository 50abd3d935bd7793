"""Kimi Delta Attention in FLA's format: what its configurations can say."""

from __future__ import annotations

from typing import Any

from families.cases import fla

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_heads": 2,
    "head_dim": 12,
    "intermediate_size": 48,
}
CASES = [
    fla("kda", "kda", **TINY),
    fla(
        "kda-wide-negative-tied",
        "kda",
        seed=1,
        embedding=0.3,
        **{**TINY, "expand_v": 1.5, "allow_neg_eigval": True, "conv_size": 3, "tie_word_embeddings": True},
    ),
]
