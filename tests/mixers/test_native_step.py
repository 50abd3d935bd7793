"""One token in one native call equals the mixer's own torch path."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from laws.mixer_cases import build, by_definition, mixer_params, variants
from linstate.ops import native, native_mixer

pytestmark = pytest.mark.skipif(not native.available, reason=f"no native extension: {native.reason}")

PLANNED = [
    (name, variant)
    for name, variant in mixer_params()
    if getattr(build(name, variants(name)[variant]), "plan", None) is not None
]
BOUND = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(params=native.isas() or [None])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with native.using(request.param):
        yield request.param


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[native_mixer.Plan]:
    """The plans that were carried out."""
    seen: list[native_mixer.Plan] = []
    step = native_mixer.step

    def counted(plan: native_mixer.Plan, *args: Any, **kwargs: Any) -> Any:
        seen.append(plan)
        return step(plan, *args, **kwargs)

    monkeypatch.setattr(native_mixer, "step", counted)
    return seen


def same(found: Tensor, expected: Tensor, bound: float, what: str) -> None:
    assert found.shape == expected.shape, what
    error = (found.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error <= bound, f"{what}: off by {error:.1e}"


def test_the_mixers_that_decode_natively() -> None:
    assert {name for name, _ in PLANNED} >= {"deltanet", "gated_deltanet", "gla", "kimi_delta", "mamba2"}


@pytest.mark.parametrize("name, variant", PLANNED, ids=" ".join)
def test_a_native_step_is_the_torch_path(
    isa: str, name: str, variant: str, calls: list[native_mixer.Plan]
) -> None:
    exact = build(name, variants(name)[variant])  # float64: never native
    draw = torch.Generator().manual_seed(3)
    for dtype, bound in BOUND.items():
        mixer = build(name, variants(name)[variant], dtype)
        for weights, given in zip(exact.parameters(), mixer.parameters(), strict=True):
            weights.copy_(given)  # as rounded
        for rows in (1, 3):
            # (a part of the projection is not dense where there are several rows)
            x = torch.randn(rows, 6, mixer.d_model, generator=draw).to(dtype)
            state, expected_state = None, None
            for t in range(6):
                del calls[:]
                y, state = mixer(x[:, t : t + 1], state)
                assert calls == [mixer.plan]
                with by_definition():
                    expected, expected_state = exact(x[:, t : t + 1].double(), expected_state)
                assert len(calls) == 1
                what = f"{name} ({variant}), {dtype}, {rows} rows, token {t}"
                same(y, expected, bound, what)
                assert y.dtype == dtype and state.keys() == expected_state.keys()
                for part, tensor in expected_state.items():
                    assert state[part].dtype == torch.float32
                    same(state[part], tensor, bound, f"{what}: {part}")


@pytest.mark.parametrize("name", sorted({name for name, _ in PLANNED}))
def test_what_is_left_to_the_torch_path(name: str, calls: list[native_mixer.Plan]) -> None:
    mixer = build(name, {}, torch.float32)
    x = torch.randn(1, 2, mixer.d_model)
    mixer(x)  # two tokens
    mixer(x[:, :1], cu_seqlens=torch.tensor([0, 1]))
    mixer(x[:, :1].double().requires_grad_().float())
    mixer.double()(x[:, :1].double())
    mixer.float().requires_grad_()
    y, _ = mixer(x[:, :1])
    y.sum().backward()
    assert all(p.grad is not None for p in mixer.parameters())
    assert not calls
    with torch.no_grad():
        mixer(x[:, :1])
    assert calls == [mixer.plan]


def test_no_state_is_changed_in_place() -> None:
    mixer = build("gated_deltanet", {}, torch.float32)
    with torch.no_grad():
        _, state = mixer(torch.randn(2, 5, mixer.d_model))
        before = {name: t.clone() for name, t in state.items()}
        mixer(torch.randn(2, 1, mixer.d_model), state)
    assert all(torch.equal(state[name], t) for name, t in before.items())
