"""Falcon-H1: what its configurations can say."""

from __future__ import annotations

from typing import Any

from families.cases import hf

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "mamba_n_heads": 4,
    "mamba_d_ssm": 48,
    "mamba_d_state": 8,
    "mamba_chunk_size": 32,
    "embedding_multiplier": 1.7,
    "lm_head_multiplier": 0.6,
    "mlp_multipliers": [0.8, 0.7],
    "key_multiplier": 0.7,
    "attention_in_multiplier": 1.3,
    "attention_out_multiplier": 0.8,
    "ssm_multipliers": [0.8, 1.3, 0.7, 1.2, 0.9],
    "ssm_in_multiplier": 1.1,
    "ssm_out_multiplier": 0.9,
}
CASES = [
    hf("falcon_h1", "falcon_h1", **TINY),
    hf(
        "falcon_h1-norm-behind-gate",
        "falcon_h1",
        seed=1,
        **{**TINY, "mamba_rms_norm": True, "mamba_norm_before_gate": False, "mamba_n_groups": 2},
    ),
    hf(
        "falcon_h1-norm-before-gate-limits-biases-tied",
        "falcon_h1",
        seed=2,
        **{**TINY, "mamba_rms_norm": True, "mamba_norm_before_gate": True, "mamba_n_groups": 2}
        | {"time_step_limit": (0.05, 0.2), "attention_bias": True, "attention_in_multiplier": 1.0}
        | {"tie_word_embeddings": True, "mamba_d_ssm": None, "num_hidden_layers": 1},
    ),
]
