"""Mixture of experts: which experts a token gets, what that costs, and that its neighbours do not move a bit of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from laws.laws import close, identical
from laws.mixer_cases import decoder, randomise
from linstate.errors import ConfigError
from linstate.models import ModelConfig, feed_forward
from linstate.models.feed_forward import Experts, SwiGLU

D, F = 32, 12


def build(**options: Any) -> Experts:
    torch.manual_seed(0)
    made = randomise(Experts(D, F, **{"num_experts": 6, **options})).double().requires_grad_(False)
    assert isinstance(made, Experts)
    return made


def tokens(count: int, seed: int = 1) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(1, count, D, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize("router", ["sigmoid", "softmax"])
def test_it_is_the_weighted_sum_of_its_experts(router: str) -> None:
    layer = build(router=router, top_k=2, scale=1.5)
    x = tokens(70)  # more than a block for an expert
    weight, chosen = layer.route(x[0])
    expected = layer.shared(x)[0][0].clone()  # type: ignore[misc]
    for t in range(70):
        for p, i in zip(weight[t], chosen[t].tolist(), strict=True):
            gate, up = (layer.up[i] @ x[0, t]).chunk(2)
            expected[t] += p * (layer.down[i] @ (torch.nn.functional.silu(gate) * up))
    close(layer(x)[0][0], expected, 1e-12, "the sum over experts")
    assert len(chosen.unique()) == 6, "an expert was never tried"
    assert all(len(set(row)) == 2 for row in chosen.tolist())
    close(weight.sum(-1), torch.full((70,), 1.5, dtype=torch.float64), 1e-12, "sum of the weights")


def test_the_bias_moves_the_choice_and_not_the_weights() -> None:
    layer, x = build(top_k=2, renormalise=False), tokens(9)
    before, _ = layer.route(x[0])
    assert layer.bias is not None
    layer.bias[4] = 10.0
    weight, chosen = layer.route(x[0])
    assert (chosen[:, 0] == 4).all(), "the expert with the bias comes first everywhere"
    close(weight[:, 0], (x[0] @ layer.router.weight[4]).sigmoid(), 1e-12, "its weight has no bias in it")
    assert not torch.equal(before, weight)


def test_only_the_best_groups_count() -> None:
    layer, x = build(top_k=2, groups=3, top_groups=1), tokens(40)
    _, chosen = layer.route(x[0])
    scores = (x[0] @ layer.router.weight.T).sigmoid()
    best = scores.unflatten(-1, (3, 2)).sum(-1).argmax(-1)
    assert torch.equal(chosen // 2, best[:, None].expand(-1, 2)) and len(best.unique()) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_neighbours_do_not_move_a_bit(dtype: torch.dtype) -> None:
    layer = build(top_k=2).to(dtype)
    x = tokens(50).to(dtype)
    expected = layer(x)[0]
    for seed in range(2, 7):
        others = tokens(50, seed).to(dtype)
        others[:, 20] = x[:, 20]
        identical(layer(others)[0][:, 20], expected[:, 20], "one token among others")


def test_experts_learn_and_a_token_costs_only_its_own() -> None:
    layer = build(top_k=1, shared=0).requires_grad_()
    x = tokens(1)
    layer(x)[0].sum().backward()
    used = int(layer.route(x[0])[1])
    for weight in (layer.up, layer.down):
        assert weight.grad is not None
        assert [i for i in range(6) if weight.grad[i].count_nonzero()] == [used]
    assert layer.flops(10) == 2 * 10 * (6 * D + 3 * D * F)
    assert SwiGLU(D, F).flops(10) == 2 * 10 * 3 * D * F
    both = Experts(D, F, num_experts=6, top_k=3, shared=2, shared_gate=True)
    assert both.flops(1) == 2 * (6 * D + D + (3 + 2) * 3 * D * F)


def test_a_feed_forward_for_each_layer() -> None:
    options = {"experts": {"d_ff": 8, "num_experts": 4}}
    fields = {"pattern": ("gated_deltanet",), "num_layers": 4, "d_ff": 48, "options": options}
    model = decoder(fields, feed_forward=("swiglu", "experts"))
    assert [type(b.ff) for b in model.blocks()] == [SwiGLU, Experts, Experts, Experts], "the first dense"
    assert [b.ff.d_ff for b in model.blocks()] == [48, 8, 8, 8]
    config = ModelConfig.from_dict(model.config.to_dict())
    assert config == model.config and config.feed_forwards == ("swiglu", "experts", "experts", "experts")
    every_other = decoder(fields, feed_forward=["swiglu", "experts"] * 2)
    assert [type(b.ff) for b in every_other.blocks()] == [SwiGLU, Experts] * 2
    with pytest.raises(
        ConfigError, match=r"feed_forward must name one or up to 4, one for each layer, got 5"
    ):
        decoder(fields, feed_forward=("swiglu",) * 4 + ("experts",))
    with pytest.raises(
        ConfigError, match=r"options are given for 'experts', .* no feed-forward of it: \['swiglu'\]"
    ):
        decoder(fields)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"router": "dice"}, "router must be 'sigmoid' or 'softmax', got 'dice'"),
        ({"num_experts": 8, "groups": 3}, "num_experts into groups: 8 cannot be divided into 3 equal parts"),
        ({"num_experts": 8, "groups": 4, "top_groups": 5}, "top_groups must be 1 to groups = 4, got 5"),
        (
            {"num_experts": 8, "groups": 4, "top_groups": 2, "top_k": 5},
            "top_k must be 1 to the 4 experts of the top groups, got 5",
        ),
        ({"wheels": 4}, "feed-forward 'experts' has no option 'wheels'; it has: d_ff, num_experts, top_k"),
    ],
)
def test_what_does_not_fit_is_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        feed_forward.build("experts", D, F, options=options)


def test_options_of_other_feed_forwards() -> None:
    assert feed_forward.build("swiglu", D, 40, options={"d_ff": 8}).d_ff == 8
    with pytest.raises(ConfigError, match="feed-forward 'swiglu' has no option 'top_k'; it has: d_ff"):
        feed_forward.build("swiglu", D, None, options={"top_k": 2})
