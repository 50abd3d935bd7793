"""Zamba2: what its configurations can say."""

from __future__ import annotations

from typing import Any

from families.cases import hf

KINDS = ["linear_attention", "hybrid", "hybrid", "linear_attention", "hybrid"]
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 5,
    "layers_block_type": KINDS,
    "num_attention_heads": 4,
    "num_mem_blocks": 2,
    "use_shared_attention_adapter": True,
    "use_mem_rope": True,
    "adapter_rank": 6,
    "mamba_d_state": 8,
    "n_mamba_heads": 4,
    "mamba_ngroups": 2,
    "chunk_size": 32,
    "time_step_min": 0.05,
}
CASES = [
    hf("zamba2", "zamba2", **TINY),
    hf(
        "zamba2-one-block-no-positions",
        "zamba2",
        seed=1,
        **{**TINY, "num_mem_blocks": 1, "use_shared_attention_adapter": False, "use_mem_rope": False}
        | {"num_hidden_layers": 3, "layers_block_type": KINDS[1:4]}
        | {"mamba_ngroups": 1, "num_key_value_heads": 2},
    ),
]
