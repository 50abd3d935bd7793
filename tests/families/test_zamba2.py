"""Zamba2: what its configurations can say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from families.cases import VOCABULARY, hf
from linstate.errors import CheckpointError
from linstate.models.checkpoint import load_decoder, read_json
from oracles.oracle import deviation

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


@torch.no_grad()
def test_a_file_may_hold_a_shared_block_again(tmp_path: Path) -> None:
    """Older files have it in every layer that uses it; where the copies differ, no block is shared."""
    oracle = CASES[1].save(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    first, again = "model.layers.0.shared_transformer.", "model.layers.1.shared_transformer."
    copies = {n.replace(first, again): t.clone() for n, t in weights.items() if n.startswith(first)}
    assert copies
    safetensors.torch.save_file({**weights, **copies}, path)
    tokens = torch.arange(20)[None] % VOCABULARY
    found, _ = load_decoder(tmp_path, read_json(tmp_path / "config.json"))(tokens)
    assert deviation(found, oracle(tokens, torch.float32)) <= 1e-4

    copies[f"{again}self_attn.o_proj.weight"] += 1
    safetensors.torch.save_file({**weights, **copies}, path)
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.shared_transformer\.self_attn\.o_proj\.weight is not"
    ):
        load_decoder(tmp_path, read_json(tmp_path / "config.json"))
