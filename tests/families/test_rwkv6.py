"""RWKV-6 in FLA's format: what its configurations can say."""

from __future__ import annotations

from typing import Any

from families.cases import fla

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_heads": 2,
    "expand_k": 1.0,
    "proj_low_rank_dim": 4,
    "gate_low_rank_dim": 6,
}
VALUES = {
    "x_bias": lambda u: u,
    "mu": lambda u: u,
    "bonus": lambda u: 2 * u,
    "w_proj.linear.lora.2.bias": lambda u: 6 * u - 5,
}
CASES = [
    fla("rwkv6", "rwkv6", values=VALUES, **TINY),
    fla(
        "rwkv6-heads-tied",
        "rwkv6",
        seed=1,
        values=VALUES,
        embedding=0.6,  # of small ones a first value that nearly cancels is half the result, and the group norm blows it up
        **{
            **TINY,
            "num_heads": 4,
            "intermediate_size": 48,
            "norm_first": False,
            "fuse_norm": False,
            "norm_eps": 1e-4,
            "tie_word_embeddings": True,
        },
    ),
]
