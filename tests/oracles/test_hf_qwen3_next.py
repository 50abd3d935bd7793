"""``gated_deltanet`` is Hugging Face's layer in Qwen3-Next (grouped heads) and OLMo Hybrid (beta up to 2)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from linstate.mixers.gated_deltanet import GatedDeltaNet
from linstate.models import ModelConfig
from linstate.models.families._qwen import linear_layer
from linstate.models.families.qwen3_next import projections
from oracles.hf_weights import by_rules
from oracles.oracle import hf_module, hold, pieces, randomise

pytestmark = pytest.mark.oracle

GATES = {"A_log": lambda u: 2 * u - 2, "dt_bias": lambda u: 2 * u - 4}
SIZES = {
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 20,
    "linear_conv_kernel_dim": 4,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
}


def read(theirs: nn.Module, cache: object, inputs: list[Tensor]) -> list[tuple[Tensor, dict[str, Tensor]]]:
    results = []
    for x in inputs:
        y = theirs(x, cache_params=cache)
        conv = cache.get_conv_state(0)[..., 1:].transpose(1, 2).clone()
        results.append((y, {"S": cache.get_recurrent_state(0).clone(), "conv": conv}))
    return results


@pytest.mark.parametrize(("hk", "hv"), [(2, 2), (2, 6)])
@torch.no_grad()
def test_qwen3_next(hk: int, hv: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    modeling = hf_module("qwen3_next", monkeypatch)
    config = modeling.Qwen3NextConfig(
        hidden_size=48, linear_num_key_heads=hk, linear_num_value_heads=hv, **SIZES
    )
    theirs = modeling.Qwen3NextGatedDeltaNet(config, layer_idx=0).eval()
    randomise(theirs, **GATES)
    ours = GatedDeltaNet(48, num_heads=hk, head_dim=12, num_v_heads=hv, v_head_dim=20)
    options = {"num_heads": hk, "head_dim": 12, "num_v_heads": hv, "v_head_dim": 20}
    rules = projections(ModelConfig(1, 48, ("gated_deltanet",), options={"gated_deltanet": options}))
    ours.load_state_dict(by_rules(theirs, linear_layer(rules)))
    inputs = pieces(48)
    hold(ours, read(theirs, modeling.DynamicCache(config=config), inputs), inputs)


@pytest.mark.parametrize("negative", [False, True])
@torch.no_grad()
def test_olmo_hybrid(negative: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    modeling = hf_module("olmo_hybrid", monkeypatch)
    config = modeling.OlmoHybridConfig(
        hidden_size=48,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_allow_neg_eigval=negative,
        **SIZES,
    )
    theirs = modeling.OlmoHybridGatedDeltaNet(config, layer_idx=0).eval()
    randomise(theirs, **GATES)
    ours = GatedDeltaNet(
        48,
        num_heads=2,
        head_dim=12,
        num_v_heads=4,
        v_head_dim=20,
        negative_eigenvalues=negative,
        norm_eps=1e-5,
    )
    rows = [getattr(theirs, f"{name}_proj").weight for name in ("q", "k", "v", "g", "b", "a")]
    ours.load_state_dict(
        {
            "in_proj.weight": torch.cat(rows),
            "conv.weight": theirs.conv1d.weight.squeeze(1),
            "A_log": theirs.A_log,
            "dt_bias": theirs.dt_bias,
            "norm.weight": theirs.o_norm.weight,
            "out_proj.weight": theirs.o_proj.weight,
        }
    )
    inputs = pieces(48)
    hold(ours, read(theirs, modeling.DynamicCache(config=config), inputs), inputs)
