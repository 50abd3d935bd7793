"""``hgrn2`` is FLA's layer, weights and lower bounds copied, its kernels replaced by its own torch references."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from linstate.errors import ArgumentError
from linstate.mixers.base import Place
from linstate.mixers.hgrn2 import HGRN2
from linstate.models import Decoder, ModelConfig
from linstate.models.families.hgrn2 import layer_rules
from oracles import fla_models
from oracles.fla_layers import Cache, fla_module
from oracles.hf_weights import by_rules
from oracles.oracle import agree, hold, pieces, randomise

pytestmark = pytest.mark.oracle

D, H, K, LAYERS = 48, 3, 16, 4


@pytest.fixture
def fla(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    fla_models.plain("hgrn2", monkeypatch)
    return fla_module("layers.hgrn2")


def bounds(gamma: Tensor) -> Tensor:
    """FLA's model: the softmax over the layers, summed up, without the first."""
    summed = gamma.softmax(0).cumsum(0)
    return summed - gamma.softmax(0)[0]


@pytest.mark.parametrize("index", [0, 2])
@torch.no_grad()
def test_hgrn2(index: int, fla: ModuleType) -> None:
    torch.manual_seed(0)
    theirs = fla.HGRN2Attention(hidden_size=D, expand_ratio=K, layer_idx=index).eval()
    randomise(theirs)
    gamma = torch.randn(LAYERS, H * K)
    # theirs multiplies q by K^-1/2, which only the norm's eps can see
    ours = HGRN2(D, num_heads=H, head_dim=K, norm_eps=K * 1e-5, place=Place(index, LAYERS, first=False))
    ours.load_state_dict(by_rules(theirs, layer_rules(D)))
    cache, inputs, expected = Cache(), pieces(D), []
    for x in inputs:
        y, *_ = theirs(x, past_key_values=cache, use_cache=True, lower_bound=bounds(gamma)[index])
        expected.append((y, {"S": cache[index]["recurrent_state"].clone()}))

    hold(lambda x, state: ours(x, state, shared={"hgrn2_floor": gamma}), expected, inputs)


@torch.no_grad()
def test_the_floor_comes_from_the_first_layer_of_the_model() -> None:
    torch.manual_seed(0)
    model = Decoder(
        ModelConfig(11, 32, ("gla", "hgrn2", "gla", "hgrn2"), options={"hgrn2": {"head_dim": 16}})
    )
    first, second = model.blocks()[1].mixer, model.blocks()[3].mixer
    assert first.floor.gamma.shape == (4, 32) and second.floor.gamma is None
    first.floor.gamma.normal_()
    x = torch.randn(2, 5, 32)
    for layer, mixer in ((1, first), (3, second)):
        g, k = mixer.floor(x, {"hgrn2_floor": first.floor.gamma})
        floor = bounds(first.floor.gamma)[layer]
        agree("forget gate", g.exp(), floor + (1 - floor) * x.sigmoid())
        agree("key", k, (1 - floor) * (1 - x.sigmoid()))
    with pytest.raises(ArgumentError, match="shared must hold 'hgrn2_floor'"):
        second(x)
