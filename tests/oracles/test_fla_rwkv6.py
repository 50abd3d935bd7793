"""``rwkv6`` and the channel mix are FLA's layers, weights copied; ``rwkv5`` is its equations over FLA's naive recurrence."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from linstate.mixers.base import Place
from linstate.mixers.rwkv5 import RWKV5
from linstate.mixers.rwkv6 import RWKV6
from linstate.models.families.rwkv6 import channel_mix, time_mix
from linstate.models.feed_forward import RWKVChannelMix
from oracles import fla_models
from oracles.fla_layers import Cache, fla_module
from oracles.hf_weights import by_rules
from oracles.oracle import CUT, TOKENS, hold, pieces, randomise

pytestmark = pytest.mark.oracle

D, H, K, RANK = 32, 2, 16, 4


@pytest.fixture
def fla(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    fla_models.plain("rwkv6", monkeypatch)
    return fla_module("layers.rwkv6"), fla_module("models.rwkv6.modeling_rwkv6")


@pytest.mark.filterwarnings("ignore:According to Bo")
@torch.no_grad()
def test_rwkv6(fla: tuple[ModuleType, ModuleType]) -> None:
    torch.manual_seed(0)
    theirs = fla[0].RWKV6Attention(
        hidden_size=D, expand_k=1.0, num_heads=H, proj_low_rank_dim=RANK, gate_low_rank_dim=6, layer_idx=0
    )
    theirs.gate_fn = F.silu
    randomise(theirs, x_bias=lambda u: u, mu=lambda u: u, bonus=lambda u: 2 * u)
    theirs.w_proj.linear.lora[2].bias.copy_(torch.linspace(-5, 1, H * K))
    ours = RWKV6(D, num_heads=H, head_dim=K, mix_rank=RANK, decay_rank=6, norm_eps=1e-5)
    ours.load_state_dict(by_rules(theirs, time_mix(D, RANK)))
    cache, inputs, expected = Cache(), pieces(D), []
    for x in inputs:
        y, *_ = theirs(x, past_key_values=cache, use_cache=True)
        state = cache[0]
        expected.append((y, {"S": state["recurrent_state"].clone(), "shift": state["conv_state"][:, None]}))
    hold(ours, expected, inputs)


@torch.no_grad()
def test_rwkv5() -> None:
    """Section 3.1 of the paper, the token shift written as a sum over the whole text."""
    torch.manual_seed(0)
    ours = RWKV5(D, num_heads=H, head_dim=K, norm_eps=1e-5)
    randomise(ours, mix=lambda u: u, decay=lambda u: 6 * u - 5, bonus=lambda u: 2 * u)
    inputs = pieces(D)
    x = torch.cat(inputs, dim=1)
    before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
    r, k, v, gate = (
        F.linear(x * (1 - mu) + before * mu, ours.get_submodule(f"{name}_proj").weight)
        for mu, name in zip(ours.mix, ("r", "k", "v", "gate"), strict=True)
    )
    decay = (-ours.decay.exp()).expand_as(k)
    first = [t.unflatten(-1, (H, K)) for t in (r, k, v, decay)]
    ends, state, outputs, states = (0, CUT, TOKENS, TOKENS + 1), None, [], []
    for start, end in zip(ends, ends[1:], strict=False):
        o, state = fla_models.rwkv6(*(t[:, start:end] for t in first), ours.bonus, state)
        outputs.append(o)
        states.append(state.clone())
    o = torch.cat(outputs, dim=1).flatten(-2)
    normed = F.group_norm(o.flatten(0, 1), H, ours.norm.weight, ours.norm.bias, 1e-5).view_as(o)
    y = F.linear(normed * F.silu(gate), ours.out_proj.weight)
    expected = [
        (y[:, start:end], {"S": state, "shift": x[:, end - 1 : end]})
        for start, end, state in zip(ends, ends[1:], states, strict=False)
    ]
    hold(ours, expected, inputs)


@torch.no_grad()
def test_channel_mix(fla: tuple[ModuleType, ModuleType]) -> None:
    torch.manual_seed(0)
    theirs = fla[1].RWKV6FeedForward(hidden_size=D, hidden_act="relu", layer_idx=1)
    theirs.act_fn = lambda x: torch.relu(x) ** 2  # theirs is compiled
    ours = RWKVChannelMix(D, theirs.intermediate_size, Place(1, 3, first=False))
    randomise(theirs, mu=lambda u: u)
    ours.load_state_dict(by_rules(theirs, channel_mix()))
    inputs, cache, expected = pieces(D), Cache({1: {"ffn_state": None}}), []
    for x in inputs:
        y, _ = theirs(x, state=cache)
        expected.append((y, {"shift": cache[1]["ffn_state"][:, None]}))
    hold(ours, expected, inputs)
