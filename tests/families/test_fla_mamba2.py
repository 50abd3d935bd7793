"""Mamba-2 in FLA's format: what its configurations can say.

Grouped heads are tried with as many groups as heads: with fewer, what theirs does without a GPU gives head h the group
h mod G, against its kernels and its own decoding, which give it h // (H / G), as everyone does.
"""

from __future__ import annotations

from typing import Any

from families.cases import fla

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "head_dim": 16,
    "state_size": 12,
    "chunk_size": 32,
}
CASES = [
    fla("fla-mamba2", "mamba2", **TINY),
    fla(
        "fla-mamba2-grouped-tied",
        "mamba2",
        seed=1,
        embedding=0.3,
        **{
            **TINY,
            "head_dim": 32,
            "n_groups": 2,
            "dt_limit": (0.02, 0.5),
            "norm_before_gate": True,
            "conv_kernel": 3,
            "tie_word_embeddings": True,
        },
    ),
    fla("fla-mamba2-no-norm", "mamba2", seed=2, **{**TINY, "rmsnorm": False}),
]
