"""LFM2: convolutions with biases, and the widths of its feed-forwards."""

from __future__ import annotations

from families.cases import hf

TINY = {
    "hidden_size": 32,
    "intermediate_size": 60,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "full_attn_idxs": [1, 3],
    "block_multiple_of": 16,
}
CASES = [
    hf("lfm2", "lfm2", **TINY),
    hf(
        "lfm2-biases",
        "lfm2",
        seed=1,
        conv_bias=True,
        conv_L_cache=4,
        block_auto_adjust_ff_dim=False,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        **TINY | {"intermediate_size": 40, "num_hidden_layers": 3, "full_attn_idxs": [2]},
    ),
]
