"""HGRN2 in FLA's format: what its configurations can say."""

from __future__ import annotations

from typing import Any

from families.cases import fla

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "expand_ratio": 16,
    "intermediate_size": 48,
}
BOUNDS = {"lower_bounds": lambda u: 3 * u}
CASES = [
    fla("hgrn2", "hgrn2", values=BOUNDS, **TINY),
    fla(
        "hgrn2-heads-tied",
        "hgrn2",
        seed=1,
        values=BOUNDS,
        embedding=0.3,
        **{**TINY, "expand_ratio": None, "num_heads": 4, "norm_eps": 1e-4, "tie_word_embeddings": True},
    ),
]
