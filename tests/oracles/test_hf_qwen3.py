"""``attention`` is Hugging Face's layer in Qwen3 and Qwen3-Next: grouped heads, norms of q and k, rotary embedding, cache.

Qwen3-Next turns a part of the channels and gates the output; its norms keep their weights as distances from one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from linstate.mixers.attention import Attention
from linstate.models.families._parts import attention
from oracles.hf_weights import by_rules
from oracles.oracle import hf_module, hold, pieces, randomise

pytestmark = pytest.mark.oracle


@torch.no_grad()
def test_qwen3(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    modeling = hf_module("qwen3", monkeypatch)
    config = modeling.Qwen3Config(
        hidden_size=48,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        num_hidden_layers=1,
        attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )
    theirs = modeling.Qwen3Attention(config, layer_idx=0).eval()
    randomise(theirs)
    ours = Attention(48, num_heads=6, num_kv_heads=2, head_dim=16, rotary_base=5000.0, qk_norm=True)
    ours.load_state_dict(
        {
            "in_proj.weight": torch.cat([theirs.q_proj.weight, theirs.k_proj.weight, theirs.v_proj.weight]),
            "q_norm.weight": theirs.q_norm.weight,
            "k_norm.weight": theirs.k_norm.weight,
            "out_proj.weight": theirs.o_proj.weight,
        }
    )
    inputs, cache = pieces(48), modeling.DynamicCache(config=config)
    hold(ours, expected(theirs, cache, inputs, modeling.Qwen3RotaryEmbedding(config)), inputs)


def expected(
    theirs: Any, cache: Any, inputs: list[Tensor], rotary: Any
) -> list[tuple[Tensor, dict[str, Tensor]]]:
    found, past = [], 0
    for x in inputs:
        total = past + x.shape[1]
        position = torch.arange(past, total)[None]
        unseen = torch.full((x.shape[1], total), float("-inf")).triu(past + 1)[None, None]
        y, _ = theirs(
            x, position_embeddings=rotary(x, position), attention_mask=unseen, past_key_values=cache
        )
        layer = cache.layers[0]
        kept = {name: t.transpose(1, 2).clone() for name, t in (("k", layer.keys), ("v", layer.values))}
        found.append((y, kept))
        past = total
    return found


OPTIONS = {"num_heads": 6, "num_kv_heads": 2, "head_dim": 16, "qk_norm": "zero_centred", "output_gate": True}


@torch.no_grad()
def test_qwen3_next(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    modeling = hf_module("qwen3_next", monkeypatch)
    config = modeling.Qwen3NextConfig(
        hidden_size=48,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        num_hidden_layers=1,
        layer_types=["full_attention"],
        attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.25},
    )
    theirs = modeling.Qwen3NextAttention(config, layer_idx=0).eval()
    randomise(theirs)
    ours = Attention(48, rotary_base=5000.0, rotary_dim=4, **OPTIONS)
    ours.load_state_dict(by_rules(theirs, attention(OPTIONS)))
    inputs, cache = pieces(48), modeling.DynamicCache(config=config)
    hold(ours, expected(theirs, cache, inputs, modeling.Qwen3NextRotaryEmbedding(config)), inputs)
