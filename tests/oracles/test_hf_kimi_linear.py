"""``kimi_delta`` is Hugging Face's Kimi Delta Attention layer, weights copied."""

from __future__ import annotations

import pytest
import torch

from linstate.mixers.kimi_delta import KimiDelta
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
    rows = ("q_proj", "k_proj", "v_proj", "b_proj", "forget_gate.f_a_proj", "g_a_proj")
    ours.load_state_dict(
        {
            "in_proj.weight": torch.cat([theirs.get_submodule(name).weight for name in rows]),
            "conv.weight": theirs.conv1d.weight.squeeze(1),
            "A_log": theirs.forget_gate.A_log.flatten(),
            "dt_bias": theirs.forget_gate.dt_bias,
            "decay_proj.weight": theirs.forget_gate.f_b_proj.weight,
            "gate_proj.weight": theirs.g_b_proj.weight,
            "norm.weight": theirs.o_norm.weight,
            "out_proj.weight": theirs.o_proj.weight,
        }
    )
    cache = modeling.DynamicCache(config=config)
    inputs, expected = pieces(48), []
    for x in inputs:
        y = theirs(x, cache_params=cache)
        conv = cache.get_conv_state(0)[..., 1:].transpose(1, 2).clone()
        expected.append((y, {"S": cache.get_recurrent_state(0).clone(), "conv": conv}))
    hold(ours, expected, inputs)
