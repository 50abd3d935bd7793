"""``kimi_delta`` is Hugging Face's Kimi Delta Attention layer, weights copied."""

from __future__ import annotations

import pytest
import torch

from linstate.mixers.kimi_delta import KimiDelta
from oracles import hf_weights
from oracles.oracle import hf_module, hold, pieces, randomise

pytestmark = pytest.mark.oracle


@torch.no_grad()
def test_kimi_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    modeling = hf_module("kimi_linear", monkeypatch)
    config = modeling.KimiLinearConfig(
        hidden_size=48,
        linear_head_dim=16,
        linear_num_heads=3,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        mlp_layer_types=["dense"],
        rms_norm_eps=1e-5,
    )
    theirs = modeling.KimiLinearDeltaAttention(config, layer_idx=0).eval()
    randomise(theirs, A_log=lambda u: 2 * u - 2, dt_bias=lambda u: 3 * u - 4)
    ours = KimiDelta(48, num_heads=3, head_dim=16, norm_eps=1e-5)
    ours.load_state_dict(hf_weights.kimi_delta(theirs))
    cache = modeling.DynamicCache(config=config)
    inputs, expected = pieces(48), []
    for x in inputs:
        y = theirs(x, cache_params=cache)
        conv = cache.get_conv_state(0)[..., 1:].transpose(1, 2).clone()
        expected.append((y, {"S": cache.get_recurrent_state(0).clone(), "conv": conv}))
    hold(ours, expected, inputs)
