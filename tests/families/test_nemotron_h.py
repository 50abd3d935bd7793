"""Nemotron-H: what its configurations can say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from families.cases import hf
from linstate.errors import ConfigError
from linstate.models.checkpoint import load_decoder, read_json
from linstate.models.families._settings import Settings
from linstate.models.families.nemotron_h import layer_kinds

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


def test_what_chooses_experts_is_not_rounded(tmp_path: Path) -> None:
    CASES[0].save(tmp_path)
    raw = read_json(tmp_path / "config.json")
    wide, narrow = (load_decoder(tmp_path, raw, dtype=d) for d in (torch.float32, torch.bfloat16))
    name = "layers.1.ff.bias"
    assert narrow.state_dict()[name].dtype == torch.float32
    assert torch.equal(narrow.state_dict()[name], wide.state_dict()[name])
    assert {t.dtype for n, t in narrow.state_dict().items() if n != name} == {torch.bfloat16}


def test_layers_by_letters() -> None:
    """As the first checkpoints have them."""
    kinds = layer_kinds(Settings({"hybrid_override_pattern": "M-*E", "num_hidden_layers": 4}, "config.json"))
    assert kinds == ("mamba2", "mlp", "attention", "experts")
    with pytest.raises(ConfigError, match="hybrid_override_pattern has X, which Linstate does not do"):
        layer_kinds(Settings({"hybrid_override_pattern": "MX"}, "config.json"))
    with pytest.raises(ConfigError, match="num_hidden_layers is 5, which Linstate does not do; it does 4"):
        layer_kinds(Settings({"hybrid_override_pattern": "M-*E", "num_hidden_layers": 5}, "config.json"))
