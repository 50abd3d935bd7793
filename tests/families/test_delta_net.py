"""DeltaNet in FLA's format: what its configurations can say."""

from __future__ import annotations

from typing import Any

from families.cases import fla

TINY: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_heads": 2, "intermediate_size": 48}
CASES = [
    fla("delta_net", "delta_net", **TINY),
    fla(
        "delta_net-negative-tied",
        "delta_net",
        seed=1,
        embedding=0.3,
        branches=0.1,
        **{
            **TINY,
            "expand_k": 0.5,
            "expand_v": 2.0,
            "allow_neg_eigval": True,
            "conv_size": 3,
            "tie_word_embeddings": True,
        },
    ),
]
