"""``experts`` is Hugging Face's mixture of experts in DeepSeek-V3, Kimi Linear and Qwen3-Next, weights copied."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from linstate.models.feed_forward import Experts
from oracles import hf_weights
from oracles.oracle import BOUND, agree, deviation, hf_module, pieces, randomise

pytestmark = pytest.mark.oracle

D, F, E = 48, 20, 12


def prepare(theirs: nn.Module) -> nn.Module:
    """Random weights, experts apart from each other, and a bias that changes choices."""
    randomise(theirs)
    for name, p in theirs.named_parameters():
        if "experts." in name and p.dim() == 3:
            p.normal_(std=p.shape[-1] ** -0.5)
    for name, b in theirs.named_buffers():
        assert name == "gate.e_score_correction_bias"
        b.normal_(std=0.3)
    return theirs.eval()


def check(ours: Experts, theirs: nn.Module) -> None:
    ours.load_state_dict(hf_weights.experts(theirs))
    inputs = [x.contiguous() for x in pieces(D)]  # theirs takes no view
    for number, x in enumerate(inputs):
        agree(f"output of piece {number}", ours(x)[0], theirs(x))
    whole = torch.cat(inputs, dim=1)
    agree("output of the whole", ours(whole)[0], theirs(whole))
    if ours.bias is not None:
        ours.bias.zero_()
        assert deviation(ours(whole)[0], theirs(whole)) > 100 * BOUND, "the bias would not be seen here"


@pytest.mark.parametrize("family", ["deepseek_v3", "kimi_linear"])
@pytest.mark.parametrize(("groups", "top_groups"), [(1, 1), (4, 2), (3, 1)])
@pytest.mark.parametrize(("shared", "renormalise"), [(1, True), (2, False)])
@torch.no_grad()
def test_sigmoid_router(
    family: str, groups: int, top_groups: int, shared: int, renormalise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    modeling = hf_module(family, monkeypatch)
    name = {"deepseek_v3": "DeepseekV3", "kimi_linear": "KimiLinear"}[family]
    layers = {"layer_types": ["full_attention"], "mlp_layer_types": ["sparse"]}
    config = getattr(modeling, f"{name}Config")(
        hidden_size=D,
        moe_intermediate_size=F,
        num_hidden_layers=1,
        num_local_experts=E,
        num_experts_per_tok=3,
        n_shared_experts=shared,
        n_group=groups,
        topk_group=top_groups,
        norm_topk_prob=renormalise,
        routed_scaling_factor=2.446,
        **(layers if family == "kimi_linear" else {}),
    )
    theirs = prepare(getattr(modeling, f"{name}MoE")(config))
    ours = Experts(
        D,
        F,
        num_experts=E,
        top_k=3,
        shared=shared,
        renormalise=renormalise,
        scale=2.446,
        groups=groups,
        top_groups=top_groups,
    )
    check(ours, theirs)


@pytest.mark.parametrize("renormalise", [True, False])
@torch.no_grad()
def test_softmax_router(renormalise: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    modeling = hf_module("qwen3_next", monkeypatch)
    config = modeling.Qwen3NextConfig(
        hidden_size=D,
        moe_intermediate_size=F,
        shared_expert_intermediate_size=F,
        num_experts=E,
        num_experts_per_tok=3,
        norm_topk_prob=renormalise,
        num_hidden_layers=1,
    )
    theirs = prepare(modeling.Qwen3NextSparseMoeBlock(config))
    ours = Experts(D, F, num_experts=E, top_k=3, router="softmax", shared_gate=True, renormalise=renormalise)
    check(ours, theirs)
