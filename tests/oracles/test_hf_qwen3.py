"""``attention`` is Hugging Face's layer in Qwen3: grouped heads, norms of q and k, rotary embedding, cache."""

from __future__ import annotations

import pytest
import torch

from linstate.mixers.attention import Attention
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
    rotary = modeling.Qwen3RotaryEmbedding(config)
    cache = modeling.DynamicCache(config=config)
    inputs, expected, past = pieces(48), [], 0
    for x in inputs:
        total = past + x.shape[1]
        position = torch.arange(past, total)[None]
        unseen = torch.full((x.shape[1], total), float("-inf")).triu(past + 1)[None, None]
        y, _ = theirs(
            x, position_embeddings=rotary(x, position), attention_mask=unseen, past_key_values=cache
        )
        layer = cache.layers[0]
        kept = {name: t.transpose(1, 2).clone() for name, t in (("k", layer.keys), ("v", layer.values))}
        expected.append((y, kept))
        past = total
    hold(ours, expected, inputs)
