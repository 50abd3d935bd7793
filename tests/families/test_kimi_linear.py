"""Kimi Linear: mixtures, latent queries, and the configurations of the released models."""

from __future__ import annotations

import json

import pytest

from families.cases import hf
from linstate.errors import ConfigError
from linstate.models.families import find
from linstate.models.families._settings import Settings

TINY = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 5,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
    "kv_lora_rank": 16,
    "linear_head_dim": 8,
    "linear_num_heads": 3,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CASES = [
    hf("kimi_linear", "kimi_linear", **TINY),
    hf(
        "kimi_linear-groups",
        "kimi_linear",
        seed=1,
        **TINY
        | {
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "mlp_layer_types": ["sparse", "dense", "sparse"],
            "num_local_experts": 6,
            "n_group": 3,
            "topk_group": 2,
            "n_shared_experts": 2,
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.5,
            "q_lora_rank": 20,
        },
    ),
]

RELEASED = {
    "model_type": "kimi_linear",
    "head_dim": 72,
    "hidden_act": "silu",
    "hidden_size": 48,
    "intermediate_size": 40,
    "kv_lora_rank": 16,
    "linear_attn_config": {
        "full_attn_layers": [4, 5],
        "head_dim": 8,
        "kda_layers": [1, 2, 3],
        "num_heads": 3,
        "short_conv_kernel_size": 4,
    },
    "mla_use_nope": True,
    "model_max_length": 1048576,
    "moe_intermediate_size": 24,
    "moe_layer_freq": 1,
    "moe_renormalize": True,
    "moe_router_activation_func": "sigmoid",
    "first_k_dense_replace": 1,
    "num_attention_heads": 3,
    "num_expert_group": 1,
    "num_experts": 4,
    "num_experts_per_token": 2,
    "num_hidden_layers": 5,
    "num_key_value_heads": 3,
    "num_nextn_predict_layers": 0,
    "num_shared_experts": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "routed_scaling_factor": 2.446,
    "topk_group": 1,
    "use_grouped_topk": True,
    "v_head_dim": 12,
    "vocab_size": 97,
}
"""The settings of the released models, with small sizes."""


def configured(**changed: object) -> dict[str, object]:
    raw = json.loads(json.dumps(RELEASED | changed))
    settings = Settings(raw, "config.json")
    config = find(raw, "config.json").config(settings)
    settings.finish()
    return config.to_dict()


def test_a_released_configuration() -> None:
    made = configured()
    assert made["pattern"] == ["kimi_delta"] * 3 + ["mla"] * 2
    assert made["feed_forward"] == ["swiglu"] + ["experts"] * 4
    assert made["options"]["kimi_delta"] == {"num_heads": 3, "head_dim": 8, "conv_width": 4, "norm_eps": 1e-5}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (
            {"linear_attn_config": RELEASED["linear_attn_config"] | {"gate_lower_bound": -5.0}},
            "gate_lower_bound = -5.0",
        ),
        (
            {"linear_attn_config": RELEASED["linear_attn_config"] | {"kda_layers": [1, 2]}},
            "each of 1 to 5 once",
        ),
        ({"mla_use_nope": False}, "mla_use_nope is False"),
        ({"num_experts_per_tok": 3}, "must say the same"),
        ({"moe_router_activation_func": "softmax"}, "it does 'sigmoid'"),
    ],
)
def test_what_it_refuses(changed: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        configured(**changed)
