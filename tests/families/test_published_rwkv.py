"""Configurations of published RWKV, RecurrentGemma and FLA models are read, and ask for as many weights as were published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from linstate.models.checkpoint import own_weights
from linstate.models.families import find
from linstate.models.families._settings import Settings
from linstate.models.families.base import Header
from linstate.models.pth import settings_of

RWKV_4_169M = {
    "model_type": "rwkv",
    "architectures": ["RwkvForCausalLM"],
    "attention_hidden_size": 768,
    "bos_token_id": 0,
    "context_length": 1024,
    "eos_token_id": 0,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "layer_norm_epsilon": 1e-05,
    "num_hidden_layers": 12,
    "rescale_every": 6,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 50277,
}
RECURRENT_GEMMA_2B = {
    "model_type": "recurrent_gemma",
    "_block_types": ["recurrent", "recurrent", "attention"],
    "architectures": ["RecurrentGemmaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_window_size": 2048,
    "conv1d_width": 4,
    "embeddings_scale_by_sqrt_dim": True,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2560,
    "intermediate_size": 15360,
    "logits_soft_cap": 30.0,
    "lru_width": 2560,
    "num_attention_heads": 10,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "vocab_size": 256000,
}
RWKV7_GOOSE_168M = {
    "model_type": "rwkv7",
    "a_low_rank_dim": 64,
    "attn": None,
    "attn_mode": "chunk",
    "decay_low_rank_dim": 64,
    "fuse_cross_entropy": True,
    "fuse_norm": False,
    "gate_low_rank_dim": 128,
    "head_dim": 64,
    "hidden_act": "sqrelu",
    "hidden_ratio": 4.0,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "norm_bias": True,
    "norm_eps": 1e-05,
    "norm_first": True,
    "num_heads": None,
    "num_hidden_layers": 12,
    "tie_word_embeddings": False,
    "v_low_rank_dim": 32,
    "value_dim": [768] * 12,
    "vocab_size": 50304,
}
GLA_DEFAULT = {
    "model_type": "gla",
    "attn": None,
    "attn_mode": "chunk",
    "clamp_min": None,
    "conv_size": 4,
    "elementwise_affine": True,
    "expand_k": 0.5,
    "expand_v": 1,
    "feature_map": None,
    "fuse_cross_entropy": True,
    "fuse_norm": True,
    "fuse_swiglu": True,
    "hidden_act": "swish",
    "hidden_ratio": 4,
    "hidden_size": 2048,
    "initializer_range": 0.006,
    "intermediate_size": None,
    "max_position_embeddings": 2048,
    "norm_eps": 1e-06,
    "num_heads": 4,
    "num_hidden_layers": 24,
    "num_kv_heads": None,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_gk": True,
    "use_gv": False,
    "use_output_gate": True,
    "use_short_conv": False,
    "vocab_size": 32000,
}


def pth_168m() -> dict[str, Any]:
    """RWKV-x070-Pile-168M: what its tensors' shapes say."""
    shapes = {
        "emb.weight": (50304, 768),
        "blocks.0.att.r_k": (12, 64),
        "blocks.0.att.w1": (768, 64),
        "blocks.0.att.a1": (768, 64),
        "blocks.0.att.g1": (768, 128),
        "blocks.1.att.v1": (768, 32),
        "blocks.0.ffn.key.weight": (3072, 768),
        "blocks.11.ln1.weight": (768,),
    }
    return settings_of(
        {name: Header(Path("m.pth"), shape, "BF16") for name, shape in shapes.items()}, "m.pth"
    )


@pytest.mark.parametrize(
    ("raw", "millions"),
    [
        (RWKV_4_169M, 169.3),
        (RECURRENT_GEMMA_2B, 2683),
        (RWKV7_GOOSE_168M, 168),
        (pth_168m(), 168),
        (GLA_DEFAULT, 1365),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else str(value),
)
def test_weights_of_published_checkpoints(raw: dict[str, Any], millions: float) -> None:
    family, settings = find(raw, "config.json"), Settings(raw, "config.json")
    config = family.config(settings)
    family.weights(config, settings, {})
    settings.finish()
    assert sum(t.numel() for t in own_weights(config).values()) / 1e6 == pytest.approx(millions, rel=0.01)
