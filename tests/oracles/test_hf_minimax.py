"""``lightning`` is Hugging Face's lightning attention in MiniMax, weights copied, and ``transnormer`` shares its core.

Their layer goes on from its own cache, in a loop over tokens; it is their model that reads the length of the text from
the wrong layer's cache. So the layer is held in pieces, and the model is not used.
"""

from __future__ import annotations

import pytest
import torch

from linstate.mixers.base import Place
from linstate.mixers.lightning import Lightning
from oracles.oracle import hf_module, hold, pieces, randomise

pytestmark = pytest.mark.oracle

D, H, K, LAYERS = 48, 3, 16, 3


@pytest.mark.parametrize("index", [0, 1, 2])
@torch.no_grad()
def test_minimax(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    modeling = hf_module("minimax", monkeypatch)
    config = modeling.MiniMaxConfig(
        hidden_size=D,
        num_attention_heads=H,
        head_dim=K,
        num_hidden_layers=LAYERS,
        layer_types=["linear_attention"] * LAYERS,
        block_size=16,
    )
    theirs = modeling.MiniMaxLightningAttention(config, layer_idx=index).eval()
    randomise(theirs)
    ours = Lightning(D, num_heads=H, head_dim=K, place=Place(index, LAYERS, first=index == 0))
    parts = theirs.qkv_proj.weight.unflatten(0, (H, 3, K)).transpose(
        0, 1
    )  # theirs: q, k, v of a head together
    ours.load_state_dict(
        {
            "in_proj.weight": torch.cat([parts.reshape(3 * H * K, D), theirs.output_gate.weight]),
            "norm.weight": theirs.norm.weight,
            "out_proj.weight": theirs.out_proj.weight,
        }
    )
    cache, inputs, expected = modeling.MiniMaxCache(), pieces(D), []
    for x in inputs:
        y, _ = theirs(x, None, None, past_key_values=cache)
        expected.append((y, {"S": cache.get_linear_cache(index).clone()}))
    hold(ours, expected, inputs)
