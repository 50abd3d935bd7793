"""Nemotron-H: what its configurations can say."""

from __future__ import annotations

from typing import Any

from families.cases import hf

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "linear_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "ssm_state_size": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 12,
    "n_groups": 2,
    "chunk_size": 32,
    "moe_intermediate_size": 20,
    "moe_shared_expert_intermediate_size": 28,
    "n_routed_experts": 4,
    "time_step_min": 0.05,
}
CASES = [
    hf("nemotron_h", "nemotron_h", **TINY),
    hf(
        "nemotron_h-latent-groups-of-experts",
        "nemotron_h",
        seed=1,
        **{**TINY, "layers_block_type": ["mlp", "linear_attention", "full_attention", "moe"]}
        | {"moe_latent_size": 16, "n_routed_experts": 6, "n_group": 3, "topk_group": 2, "n_groups": 1}
        | {"norm_topk_prob": False, "routed_scaling_factor": 1.8},
    ),
]
