"""RetNet in FLA's format: what its configurations can say."""

from __future__ import annotations

from typing import Any

from families.cases import fla

TINY: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_heads": 2, "intermediate_size": 48}
CASES = [
    fla("retnet", "retnet", **TINY),
    fla(
        "retnet-narrow-tied",
        "retnet",
        seed=1,
        embedding=0.3,
        **{
            **TINY,
            "expand_k": 0.5,
            "expand_v": 1.0,
            "fuse_norm": False,
            "tie_word_embeddings": True,
            "intermediate_size": None,
            "hidden_ratio": 12,
        },
    ),
]
