"""``rwkv6`` and the channel mix are FLA's layers, weights copied; ``rwkv5`` is its equations over FLA's naive recurrence."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linstate.mixers.base import Place
from linstate.mixers.rwkv5 import RWKV5
from linstate.mixers.rwkv6 import RWKV6
from linstate.models.feed_forward import RWKVChannelMix
from oracles.fla_layers import Cache, fla_module, token_shift
from oracles.oracle import CUT, TOKENS, fla_naive, hold, pieces, randomise

pytestmark = pytest.mark.oracle

D, H, K, RANK = 32, 2, 16, 4
SHARED = ("r_proj", "k_proj", "v_proj")


def wkv(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, initial_state: Tensor | None, **rest: Any
) -> tuple[Tensor, Tensor]:
    """FLA's naive recurrence, which is head-first and multiplies by K^-1/2 unless told."""
    first = (t.transpose(1, 2) for t in (r, k, v, w))
    naive = fla_naive("rwkv6/recurrent_naive").naive_recurrent_rwkv6
    o, state = naive(*first, u, scale=1.0, initial_state=initial_state, output_final_state=True)
    return o.transpose(1, 2), state


class PlainGroupNorm(nn.Module):
    """FLA's group norm over the last axis, in torch."""

    def __init__(self, theirs: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias = theirs.weight, theirs.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x.flatten(0, -2), H, self.weight, self.bias, 1e-5).view_as(x)


@pytest.fixture
def fla(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    layer, model = fla_module("layers.rwkv6"), fla_module("models.rwkv6.modeling_rwkv6")
    monkeypatch.setattr(layer, "token_shift", token_shift)
    monkeypatch.setattr(model, "token_shift", token_shift)
    monkeypatch.setattr(layer, "chunk_rwkv6", wkv)
    monkeypatch.setattr(layer, "fused_recurrent_rwkv6", wkv)
    return layer, model


@pytest.mark.filterwarnings("ignore:According to Bo")
@torch.no_grad()
def test_rwkv6(fla: tuple[ModuleType, ModuleType]) -> None:
    torch.manual_seed(0)
    theirs = fla[0].RWKV6Attention(
        hidden_size=D, expand_k=1.0, num_heads=H, proj_low_rank_dim=RANK, gate_low_rank_dim=6, layer_idx=0
    )
    theirs.g_norm, theirs.gate_fn = PlainGroupNorm(theirs.g_norm), F.silu
    randomise(theirs, x_bias=lambda u: u, mu=lambda u: u, bonus=lambda u: 2 * u)
    theirs.w_proj.linear.lora[2].bias.copy_(torch.linspace(-5, 1, H * K))
    ours = RWKV6(D, num_heads=H, head_dim=K, mix_rank=RANK, decay_rank=6, norm_eps=1e-5)
    order = torch.tensor([0, 2, 3, 4, 1])  # theirs: r, w, k, v, g; ours: r, k, v, g, w
    narrow = theirs.x_proj[0].linear.weight.unflatten(0, (5, RANK))[order]
    ours.load_state_dict(
        {
            "mix": torch.cat([theirs.x_bias[order], theirs.x_proj[0].mu[None]]),
            "mix_narrow.weight": narrow.flatten(0, 1),
            "mix_widen": theirs.x_proj[2].weight.unflatten(1, (5, RANK)).transpose(0, 1)[order],
            "decay": theirs.w_proj.linear.lora[2].bias,
            "decay_lora.narrow.weight": theirs.w_proj.linear.lora[0].weight,
            "decay_lora.widen.weight": theirs.w_proj.linear.lora[2].weight,
            "bonus": theirs.bonus,
            **{f"{name}.weight": theirs.get_submodule(name).linear.weight for name in SHARED},
            "gate_proj.weight": theirs.g_proj.linear.weight,
            "norm.weight": theirs.g_norm.weight,
            "norm.bias": theirs.g_norm.bias,
            "out_proj.weight": theirs.o_proj.weight,
        }
    )
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
        o, state = wkv(*(t[:, start:end] for t in first), ours.bonus, state)
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
    ours.load_state_dict(
        {
            "mix": torch.stack([theirs.key.mu, theirs.receptance.mu]),
            "up.weight": theirs.key.linear.weight,
            "down.weight": theirs.value.weight,
            "receptance.weight": theirs.receptance.linear.weight,
        }
    )
    inputs, cache, expected = pieces(D), Cache({1: {"ffn_state": None}}), []
    for x in inputs:
        y, _ = theirs(x, state=cache)
        expected.append((y, {"shift": cache[1]["ffn_state"][:, None]}))
    hold(ours, expected, inputs)
