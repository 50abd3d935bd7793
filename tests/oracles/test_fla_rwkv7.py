"""``rwkv7`` and its channel mix are FLA's layers, weights copied, its kernels replaced by its own torch references."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from linstate.mixers.base import Place
from linstate.mixers.rwkv7 import RWKV7
from linstate.models.families.rwkv7 import channel_mix, time_mix
from linstate.models.feed_forward import RWKV7ChannelMix
from oracles import fla_models
from oracles.fla_layers import Cache, fla_module
from oracles.hf_weights import by_rules
from oracles.oracle import agree, hold, pieces, randomise

pytestmark = pytest.mark.oracle

D, H, K, PLACES = 32, 2, 16, 3


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    """The files of the time mix and of the channel mix."""
    fla_models.plain("rwkv7", monkeypatch)
    return fla_module("layers.rwkv7"), fla_module("models.rwkv7.modeling_rwkv7")


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
    rules, initial = time_mix(D, index), ours.state_dict()
    expected_initial = by_rules(theirs, rules)
    for name in ("mix", "decay_lora.widen.bias", "rate_lora.widen.bias", "k_k", "k_a", "r_k", "norm.weight"):
        torch.testing.assert_close(initial[name], expected_initial[name], msg=f"initial {name}")

    randomise(theirs, **{f"x_{i}": lambda u: u for i in "rwkvag"})
    ours.load_state_dict(by_rules(theirs, rules))

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
    ours.load_state_dict(by_rules(theirs, channel_mix()))
    inputs, cache, expected = pieces(D), Cache({1: {"ffn_state": None}}), []
    for x in inputs:
        y, _ = theirs(x, state=cache)
        expected.append((y, {"shift": cache[1]["ffn_state"][:, None]}))
    hold(ours, expected, inputs)
