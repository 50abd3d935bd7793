"""Qwen3-Next: what its configurations can say."""

from __future__ import annotations

from typing import Any

from families.cases import CENTRED, hf

LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}
ATTENTION: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
TINY = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 4, **LINEAR, **ATTENTION, **EXPERTS}
CASES = [
    hf("qwen3_next", "qwen3_next", values=CENTRED, **TINY),
    hf(
        "qwen3_next-dense-tied-biases",
        "qwen3_next",
        seed=1,
        values=CENTRED,
        **TINY
        | {
            "mlp_only_layers": [1],
            "decoder_sparse_step": 2,
            "norm_topk_prob": False,
            "linear_num_value_heads": 2,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
        },
    ),
]
