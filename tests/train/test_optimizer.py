"""The optimiser: Muon for matrices, AdamW for the rest."""

from __future__ import annotations

import copy

import pytest
import torch

from linstate.train.optimizer import MuonAdamW, build_optimizer, orthogonalise
from small_models import build


@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 40)])
def test_singular_values_move_to_about_one(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    before, after = torch.linalg.svdvals(matrix), torch.linalg.svdvals(orthogonalise(matrix))
    assert before.max() / before.min() > 3
    assert after.min() > 0.3 and after.max() < 1.4
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    nearest = u @ vh
    cosine = (orthogonalise(matrix) * nearest).sum() / (orthogonalise(matrix).norm() * nearest.norm())
    assert cosine > 0.97


def test_the_rest_is_adamw():
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(7))
    theirs = copy.deepcopy(ours)
    a = MuonAdamW([{"params": [ours], "muon": False, "weight_decay": 0.1}], lr=0.01)
    b = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.98), weight_decay=0.1)
    for _ in range(20):
        grad = torch.randn(7)
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        a.step()
        b.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_who_gets_which():
    decoder = build("hybrid").decoder
    muon, adamw = build_optimizer(decoder, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.1).param_groups
    names = {id(p): n for n, p in decoder.named_parameters()}
    by_muon = {names[id(p)] for p in muon["params"]}
    by_adamw = {names[id(p)] for p in adamw["params"]}
    assert "layers.0.mixer.in_proj.weight" in by_muon or any("proj" in n for n in by_muon)
    assert {"embedding.weight", "norm.weight"} <= by_adamw
    assert not any("conv" in n or "A_log" in n for n in by_muon)
    assert by_muon | by_adamw == set(names.values()) and not by_muon & by_adamw


def test_a_stopped_optimiser_goes_on_the_same():
    torch.manual_seed(0)
    decoder = build("delta").decoder
    x = torch.randint(300, (2, 20))

    def step(model, optimizer):
        logits, _ = model(x)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    def make(model):
        return build_optimizer(model, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.1)

    optimizer = make(decoder)
    first = step(decoder, optimizer)
    other = copy.deepcopy(decoder)
    resumed = make(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    a = [step(decoder, optimizer) for _ in range(6)]
    b = [step(other, resumed) for _ in range(6)]
    assert a == b and a[-1] < first
