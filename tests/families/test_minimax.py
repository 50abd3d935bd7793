"""MiniMax: both kinds of layers, a window, the scales of its residual sums, and decays that the checkpoint holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from families.cases import hf
from linstate.errors import CheckpointError
from linstate.models.checkpoint import load_decoder, read_json

TINY = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 4,
    "block_size": 16,
}
CASES = [
    hf("minimax", "minimax", **TINY),
    hf(
        "minimax-window-scales",
        "minimax",
        seed=1,
        sliding_window=9,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        full_attn_alpha_factor=1.5,
        full_attn_beta_factor=0.75,
        linear_attn_alpha_factor=0.5,
        linear_attn_beta_factor=1.25,
        mlp_alpha_factor=2,
        mlp_beta_factor=0.5,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        tie_word_embeddings=True,
        **TINY | {"num_hidden_layers": 3, "block_size": 32},
    ),
]


@pytest.mark.oracle
def test_other_decays_are_refused(tmp_path: Path) -> None:
    CASES[0].save(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    weights["model.layers.1.self_attn.slope_rate"] *= 1.5
    safetensors.torch.save_file(weights, path)
    with pytest.raises(CheckpointError, match="slope_rate is not what the configuration says"):
        load_decoder(tmp_path, read_json(tmp_path / "config.json"), dtype=torch.float32)
