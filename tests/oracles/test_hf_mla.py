"""``mla`` is Hugging Face's layer in DeepSeek-V3 (with rotary embedding) and Kimi Linear (without), weights copied."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from linstate.mixers.mla import MLA
from oracles import hf_weights
from oracles.oracle import agree, hf_module, hold, pieces, randomise

pytestmark = pytest.mark.oracle

D, H, K, KR, V, R = 48, 3, 16, 8, 20, 24
SIZES = {
    "hidden_size": D,
    "num_attention_heads": H,
    "num_key_value_heads": H,
    "qk_nope_head_dim": K,
    "qk_rope_head_dim": KR,
    "v_head_dim": V,
    "kv_lora_rank": R,
    "num_hidden_layers": 1,
    "attn_implementation": "eager",
}
OURS = {"num_heads": H, "head_dim": K, "v_head_dim": V, "kv_rank": R, "rotary_dim": KR}


def expected(
    theirs: Any, cache: Any, inputs: list[Tensor], rotary: Any | None
) -> list[tuple[Tensor, dict[str, Tensor]]]:
    found, past = [], 0
    for x in inputs:
        total = past + x.shape[1]
        unseen = torch.full((x.shape[1], total), float("-inf")).triu(past + 1)[None, None]
        turn = {} if rotary is None else {"position_embeddings": rotary(x, torch.arange(past, total)[None])}
        y, _ = theirs(x, attention_mask=unseen, past_key_values=cache, **turn)
        layer = cache.layers[0]  # the latents stand as its keys, what all heads share as its values
        found.append((y, {"latent": torch.cat([layer.keys, layer.values], dim=-1)[:, 0].clone()}))
        past = total
    return found


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("q_rank", [None, 20])
@torch.no_grad()
def test_deepseek_v3(q_rank: int | None, interleaved: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    modeling = hf_module("deepseek_v3", monkeypatch)
    config = modeling.DeepseekV3Config(
        **SIZES,
        q_lora_rank=q_rank,
        rope_interleave=interleaved,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )
    theirs = modeling.DeepseekV3Attention(config, layer_idx=0).eval()
    randomise(theirs)
    ours = MLA(D, **OURS, q_rank=q_rank, rotary_base=5000.0)
    ours.load_state_dict(hf_weights.mla(theirs, interleaved=interleaved))
    inputs, cache = pieces(D), modeling.DynamicCache(config=config)
    hold(ours, expected(theirs, cache, inputs, modeling.DeepseekV3RotaryEmbedding(config)), inputs)


@torch.no_grad()
def test_kimi_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    modeling = hf_module("kimi_linear", monkeypatch)
    config = modeling.KimiLinearConfig(**SIZES, layer_types=["full_attention"], mlp_layer_types=["dense"])
    theirs = modeling.KimiLinearAttention(config, layer_idx=0).eval()
    randomise(theirs)
    ours = MLA(D, **OURS, rotary_base=None)
    ours.load_state_dict(hf_weights.mla(theirs))
    inputs, cache = pieces(D), modeling.DynamicCache(config=config)
    hold(ours, expected(theirs, cache, inputs, None), inputs)


@torch.no_grad()
def test_the_absorbed_form_is_the_expanded_one() -> None:
    """The same tokens one by one (absorbed) and at once (expanded): outputs and latents."""
    torch.manual_seed(0)
    ours = MLA(D, **OURS)
    randomise(ours)
    x = pieces(D)[0]
    whole, after = ours(x)
    state, outputs = None, []
    for token in x.split(1, dim=1):
        y, state = ours(token, state)
        outputs.append(y)
    agree("output token by token", torch.cat(outputs, dim=1), whole)
    assert state is not None
    agree("latents token by token", state["latent"], after["latent"])
