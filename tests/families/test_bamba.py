"""Bamba: what its configurations can say."""

from __future__ import annotations

from typing import Any

from families.cases import hf

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attn_layer_indices": [1],
    "mamba_n_heads": 4,
    "mamba_d_state": 8,
    "mamba_chunk_size": 32,
}
CASES = [
    hf("bamba", "bamba", **TINY),
    hf(
        "bamba-groups-limits-biases-tied",
        "bamba",
        seed=1,
        **{**TINY, "mamba_n_groups": 2, "time_step_limit": (0.05, 0.2), "attention_bias": True}
        | {"attn_layer_indices": [0], "tie_word_embeddings": True, "num_hidden_layers": 2}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    ),
]
