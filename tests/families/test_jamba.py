"""Jamba: what its configurations can say."""

from __future__ import annotations

from typing import Any

from families.cases import hf
from families.test_mamba import DT

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "attn_layer_period": 3,
    "attn_layer_offset": 1,
    "mamba_d_state": 6,
}
CASES = [
    hf("jamba", "jamba", values=DT, **TINY),
    hf(
        "jamba-dense-tied",
        "jamba",
        values=DT,
        seed=1,
        **{**TINY, "num_hidden_layers": 3, "attn_layer_period": 2, "attn_layer_offset": 0}
        | {"num_experts": 1, "tie_word_embeddings": True, "mamba_dt_rank": 3},
    ),
    hf(
        "jamba-experts-first",
        "jamba",
        values=DT,
        seed=2,
        **{**TINY, "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1}
        | {"expert_layer_period": 3, "expert_layer_offset": 0, "num_experts_per_tok": 3},
    ),
]
