"""Granite 4: what its configurations can say."""

from __future__ import annotations

from typing import Any

from families.cases import hf

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 20,
    "shared_intermediate_size": 28,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "mamba_n_heads": 4,
    "mamba_d_state": 8,
    "mamba_chunk_size": 32,
    "position_embedding_type": "rope",
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.6,
    "logits_scaling": 1.7,
}
CASES = [
    hf("granitemoehybrid", "granitemoehybrid", **TINY),
    hf(
        "granitemoehybrid-dense-groups-limits-tied",
        "granitemoehybrid",
        seed=1,
        **{**TINY, "num_local_experts": 0, "mamba_n_groups": 2, "time_step_limit": (0.05, 0.2)}
        | {"position_embedding_type": None, "tie_word_embeddings": True, "attention_bias": True},
    ),
]
