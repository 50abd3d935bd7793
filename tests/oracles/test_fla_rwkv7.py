"""``rwkv7`` and its channel mix are FLA's layers, weights copied, its kernels replaced by its own torch references."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from linstate.mixers.base import Place
from linstate.mixers.rwkv7 import RWKV7
from linstate.models.feed_forward import RWKV7ChannelMix
from oracles.fla_layers import Cache, fla_module, token_shift
from oracles.oracle import agree, fla_naive, hold, pieces, randomise

pytestmark = pytest.mark.oracle

D, H, K, PLACES = 32, 2, 16, 3


@pytest.fixture(scope="module")
def fla() -> tuple[ModuleType, ModuleType]:
    """The files of the time mix and of the channel mix."""
    return fla_module("layers.rwkv7"), fla_module("models.rwkv7.modeling_rwkv7")


@pytest.fixture
def plain(
    fla: tuple[ModuleType, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> tuple[ModuleType, ModuleType]:
    from fla.ops.rwkv7 import fused_addcmul, fused_k_update, gate_output_correction

    def chunk_rwkv7(
        r: Tensor, scale: float, initial_state: Tensor | None, **rest: Any
    ) -> tuple[Tensor, Tensor]:
        r, w, k, v, a, b = (t.transpose(1, 2) for t in (r, *(rest[name] for name in "wkvab")))
        recurrence = fla_naive("generalized_delta_rule/dplr/naive").dplr_recurrence
        o, state = recurrence(r * (scale * K**0.5), k, v, a, b, w, initial_state=initial_state)
        return o.transpose(1, 2), state

    def step(kk: Tensor, a: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
        return chunk_rwkv7(a=-kk, b=kk * a, **rest)

    layer, model = fla
    monkeypatch.setattr(layer, "token_shift", token_shift)
    monkeypatch.setattr(model, "token_shift", token_shift)
    monkeypatch.setattr(layer, "fused_addcmul_rwkv7", fused_addcmul.torch_addcmul_rwkv7)
    monkeypatch.setattr(layer, "fused_k_rwkv7", fused_k_update.k_update_ref)
    monkeypatch.setattr(layer, "gate_output_correction", gate_output_correction.gate_output_correction_ref)
    monkeypatch.setattr(layer, "chunk_rwkv7", chunk_rwkv7)
    monkeypatch.setattr(layer, "fused_mul_recurrent_rwkv7", step)
    return layer, model


NAMES = {
    "r_proj.weight": "r_proj.weight",
    "k_proj.weight": "k_proj.weight",
    "v_proj.weight": "v_proj.weight",
    "out_proj.weight": "o_proj.weight",
    "norm.weight": "g_norm.weight",
    "norm.bias": "g_norm.bias",
    "k_k": "k_k",
    "k_a": "k_a",
    "r_k": "r_k",
    **{
        f"{ours}_lora.{part}": f"{theirs}_lora.lora.{number}"
        for ours, theirs in (("decay", "w"), ("rate", "a"), ("value", "v"), ("gate", "g"))
        for part, number in (
            ("narrow.weight", "0.weight"),
            ("widen.weight", "2.weight"),
            ("widen.bias", "2.bias"),
        )
    },
}


@pytest.mark.filterwarnings("ignore:According to Bo")
@pytest.mark.parametrize("index", [0, 1])
@torch.no_grad()
def test_time_mix(index: int, plain: tuple[ModuleType, ModuleType]) -> None:
    torch.manual_seed(0)
    theirs = (
        plain[0]
        .RWKV7Attention(hidden_size=D, head_dim=K, layer_idx=index, num_hidden_layers=PLACES, norm_eps=1e-5)
        .eval()
    )
    ours = RWKV7(D, head_dim=K, place=Place(index, PLACES, first=index == 0))
    depth_dependent = [
        (name, theirs.state_dict()[name]) for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g")
    ]
    for row, (name, expected) in zip(ours.mix, depth_dependent, strict=True):
        torch.testing.assert_close(row, expected.flatten(), msg=f"initial {name}")
    for name in ("decay_lora.widen.bias", "rate_lora.widen.bias", "k_k", "k_a", "r_k", "norm.weight"):
        torch.testing.assert_close(
            ours.get_parameter(name), theirs.get_parameter(NAMES[name]), msg=f"initial {name}"
        )

    randomise(theirs, **{f"x_{i}": lambda u: u for i in "rwkvag"})
    weights = theirs.state_dict()
    copied = {name: weights[NAMES[name]] for name in ours.state_dict() if name != "mix"}
    ours.load_state_dict({**copied, "mix": torch.stack([weights[f"x_{i}"].flatten() for i in "rwkvag"])})

    inputs = pieces(D)
    firsts = [torch.randn(*x.shape[:2], H * K) for x in inputs]
    given = {x.shape[1]: v for x, v in zip(inputs, firsts, strict=True)} | {
        inputs[0].shape[1] + inputs[1].shape[1]: torch.cat(firsts[:2], dim=1)
    }
    cache, expected = Cache(), []
    for x in inputs:
        y, *_, v_first = theirs(x, past_key_values=cache, use_cache=True, v_first=given[x.shape[1]])
        if index == 0 and not expected:
            shared: dict[str, Tensor] = {}
            ours(x, shared=shared)
            agree("values for the layers after", shared["v_first"], v_first)
        state = cache[index]
        expected.append((y, {"S": state["recurrent_state"].clone(), "shift": state["conv_state"][:, None]}))

    def read(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        shared = {} if index == 0 else {"v_first": given[x.shape[1]]}
        return ours(x, state, shared=shared)

    hold(read, expected, inputs)


@torch.no_grad()
def test_channel_mix(plain: tuple[ModuleType, ModuleType]) -> None:
    torch.manual_seed(0)
    theirs = plain[1].RWKV7FeedForward(
        hidden_size=D, hidden_act="relu", layer_idx=1, num_hidden_layers=PLACES
    )
    theirs.act_fn = lambda x: torch.relu(x) ** 2  # theirs is compiled
    ours = RWKV7ChannelMix(D, place=Place(1, PLACES, first=False))
    torch.testing.assert_close(ours.mix, theirs.x_k, msg="initial mix")
    randomise(theirs, x_k=lambda u: u)
    ours.load_state_dict(
        {"mix": theirs.x_k, "up.weight": theirs.key.weight, "down.weight": theirs.value.weight}
    )
    inputs, cache, expected = pieces(D), Cache({1: {"ffn_state": None}}), []
    for x in inputs:
        y, _ = theirs(x, state=cache)
        expected.append((y, {"shift": cache[1]["ffn_state"][:, None]}))
    hold(ours, expected, inputs)
