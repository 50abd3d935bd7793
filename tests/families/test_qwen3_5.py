"""Qwen3.5: dense and mixtures, alone and inside the models that see pictures too."""

from __future__ import annotations

from families.cases import CENTRED, hf
from families.test_qwen3_next import ATTENTION, EXPERTS, LINEAR

TINY = {"hidden_size": 32, "num_hidden_layers": 4, **LINEAR, **ATTENTION}
ROPE = {
    "rope_type": "default",
    "rope_theta": 5000.0,
    "partial_rotary_factor": 0.5,
    "mrope_section": [2, 1, 1],
}
EYES = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "patch_size": 4,
}
CASES = [
    hf(
        "qwen3_5-dense",
        "qwen3_5_text",
        "qwen3_5",
        intermediate_size=40,
        tie_word_embeddings=True,
        values=CENTRED,
        **TINY,
    ),
    hf(
        "qwen3_5-dense-biases",
        "qwen3_5_text",
        "qwen3_5",
        seed=1,
        intermediate_size=40,
        attention_bias=True,
        rope_parameters=ROPE,
        values=CENTRED,
        **TINY | {"linear_num_value_heads": 2},
    ),
    hf("qwen3_5-experts", "qwen3_5_moe_text", "qwen3_5_moe", values=CENTRED, **TINY, **EXPERTS),
    hf(
        "qwen3_5-with-eyes",
        "qwen3_5",
        seed=3,
        text_config={"intermediate_size": 40, "rope_parameters": ROPE, **TINY},
        values=CENTRED,
        vision_config=EYES,
        architecture="Qwen3_5ForConditionalGeneration",
    ),
]
