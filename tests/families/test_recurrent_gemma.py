"""RecurrentGemma: what its configurations can say. Theirs is wrong in pieces; the oracle is the whole text."""

from __future__ import annotations

from typing import Any

from families.cases import hf

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "attention_window_size": 11,
}
VALUES = {
    "norm.weight": lambda u: u - 0.5,
    "recurrent_param": lambda u: 3 * u - 5,
}
CASES = [
    hf("recurrent_gemma", "recurrent_gemma", values=VALUES, embedding=0.3, **TINY),
    hf(
        "recurrent_gemma-wide-biases-untied",
        "recurrent_gemma",
        seed=1,
        values=VALUES,
        **{
            **TINY,
            "num_hidden_layers": 3,
            "lru_width": 48,
            "conv1d_width": 3,
            "attention_bias": True,
            "num_key_value_heads": 2,
            "block_types": ["attention", "recurrent"],
            "logits_soft_cap": 2.0,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.25},
        },
    ),
]
