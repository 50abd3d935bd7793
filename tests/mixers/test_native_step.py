"""One token in one native call, and many tokens in some, equal the mixer's own torch path."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from laws.mixer_cases import build, by_definition, mixer_params, randomise, variants
from linstate.errors import ArgumentError
from linstate.mixers.base import Mixer, Place
from linstate.mixers.rwkv7 import RWKV7
from linstate.ops import native
from linstate.ops.dispatch import TABLE
from linstate.ops.fused import Plan
from linstate.ops.native import rwkv as native_rwkv

pytestmark = pytest.mark.skipif(not native.available, reason=f"no native extension: {native.reason}")

PLANNED = [
    (name, variant)
    for name, variant in mixer_params()
    if name == "rwkv7" or getattr(build(name, variants(name)[variant]), "plan", None) is not None
]
BOUND = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(params=native.isas() or [None])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with native.using(request.param):
        yield request.param


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Plan | None]:
    """The plans that were carried out natively; RWKV-7 has a call of its own, and None for a plan."""
    seen: list[Plan | None] = []
    for form in ("step", "chunked"):
        kernel = TABLE["fused", form, "native"]

        def counted(plan: Plan, *args: Any, run: Any = kernel.run, **kwargs: Any) -> Any:
            seen.append(plan)
            return run(plan, *args, **kwargs)

        monkeypatch.setitem(TABLE, ("fused", form, "native"), replace(kernel, run=counted))
    time_mix = native_rwkv.time_mix

    def counted_mix(*args: Any, **kwargs: Any) -> Any:
        seen.append(None)
        return time_mix(*args, **kwargs)

    monkeypatch.setattr(native_rwkv, "time_mix", counted_mix)
    return seen


def off_by(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def same(found: Tensor, expected: Tensor, bound: float, what: str) -> None:
    assert found.shape == expected.shape, what
    error = off_by(found, expected)
    assert error <= bound, f"{what}: off by {error:.1e}, allowed {bound:.1e}"


def test_the_mixers_that_decode_natively() -> None:
    assert {name for name, _ in PLANNED} >= {
        *("deltanet", "gated_deltanet", "gla", "kimi_delta", "linear_transformer", "mamba2", "retnet"),
        *("rwkv5", "rwkv6"),
    }


@pytest.mark.parametrize("name, variant", PLANNED, ids=" ".join)
def test_a_native_step_is_the_torch_path(isa: str, name: str, variant: str, calls: list[Plan | None]) -> None:
    exact = build(name, variants(name)[variant])  # float64: never native
    draw = torch.Generator().manual_seed(3)
    for dtype, bound in BOUND.items():
        mixer = build(name, variants(name)[variant], dtype)
        for weights, given in zip(exact.parameters(), mixer.parameters(), strict=True):
            weights.copy_(given)  # as rounded
        for rows in (1, 3):
            # (a part of the projection is not dense where there are several rows)
            x = torch.randn(rows, 6, mixer.d_model, generator=draw).to(dtype)
            state, torch_state, expected_state = None, None, None
            for t in range(6):
                del calls[:]
                y, state = mixer(x[:, t : t + 1], state)
                assert calls == [getattr(mixer, "plan", None)]
                with by_definition():
                    expected, expected_state = exact(x[:, t : t + 1].double(), expected_state)
                    by_torch, torch_state = mixer(x[:, t : t + 1], torch_state)
                assert len(calls) == 1
                what = f"{name} ({variant}), {dtype}, {rows} rows, token {t}"
                # In bf16 a norm of a head with little in it makes more of the projections' rounding, in both.
                given = off_by(by_torch, expected) if dtype is torch.bfloat16 else 0.0
                same(y, expected, max(bound, 1.5 * given), what)
                assert y.dtype == dtype and state.keys() == expected_state.keys()
                for part, tensor in expected_state.items():
                    assert state[part].dtype == (torch.int64 if part == "position" else torch.float32)
                    same(state[part], tensor, bound, f"{what}: {part}")


def takes_many(mixer: Mixer) -> bool:
    plan = getattr(mixer, "plan", None)
    return plan is None or plan.of_many


@pytest.mark.parametrize("name, variant", PLANNED, ids=" ".join)
def test_many_tokens_are_the_torch_path(isa: str, name: str, variant: str, calls: list[Plan | None]) -> None:
    exact = build(name, variants(name)[variant])  # float64: never native
    if not takes_many(exact):
        pytest.skip("one token only")
    draw = torch.Generator().manual_seed(3)
    for dtype, bound in BOUND.items():
        mixer = build(name, variants(name)[variant], dtype)
        for weights, given in zip(exact.parameters(), mixer.parameters(), strict=True):
            weights.copy_(given)  # as rounded
        for rows, bounds in ((1, None), (3, None), (1, torch.tensor([0, 13, 39]))):
            state, torch_state, expected_state = None, None, None
            for tokens in (39, 70):
                x = torch.randn(rows, tokens, mixer.d_model, generator=draw).to(dtype)
                if bounds is not None:
                    bounds[-1] = tokens
                del calls[:]
                y, state = mixer(x, state, cu_seqlens=bounds)
                assert calls == [plan for plan in [getattr(mixer, "plan", None)] if plan or bounds is None]
                with by_definition():
                    expected, expected_state = exact(x.double(), expected_state, cu_seqlens=bounds)
                    by_torch, torch_state = mixer(x, torch_state, cu_seqlens=bounds)
                given = off_by(by_torch, expected) if dtype is torch.bfloat16 else 0.0
                what = f"{name} ({variant}), {dtype}, {rows} rows, {tokens} tokens, {bounds}"
                same(y, expected, max(bound, 1.5 * given), what)
                assert y.dtype == dtype and state.keys() == expected_state.keys()
                for part, tensor in expected_state.items():
                    given = off_by(torch_state[part], tensor) if dtype is torch.bfloat16 else 0.0
                    same(state[part], tensor, max(bound, 1.5 * given), f"{what}: {part}")


@pytest.mark.parametrize("name", sorted({name for name, _ in PLANNED}))
def test_what_is_left_to_the_torch_path(name: str, calls: list[Plan | None]) -> None:
    mixer = build(name, {}, torch.float32)
    x = torch.randn(1, 2, mixer.d_model)
    _, state = mixer(x)  # two tokens
    if not takes_many(mixer):
        mixer(x[:, :1], cu_seqlens=torch.tensor([0, 1]))
        assert not calls
    del calls[:]
    mixer(x[:, :1].double().requires_grad_().float())
    mixer.double()(x[:, :1].double())
    mixer.float().requires_grad_()
    y, after = mixer(x[:, :1], state)
    (y.sum() + after["S"].sum()).backward()
    assert all(p.grad is not None for p in mixer.parameters())
    assert not calls
    with torch.no_grad():
        mixer(x[:, :1])
    assert calls == [getattr(mixer, "plan", None)]


@pytest.mark.parametrize("rows", [1, 3])
def test_later_layers_of_rwkv7_mix_in_the_values_of_the_first(
    isa: str, rows: int, calls: list[Plan | None]
) -> None:
    torch.manual_seed(0)
    mixer = RWKV7(64, num_heads=4, head_dim=24, place=Place(1, 2, first=False))  # 24: no whole vectors
    exact = copy.deepcopy(randomise(mixer).requires_grad_(False)).double()
    state, expected_state = None, None
    for tokens in (1, 1, 5, 1):
        x, first = torch.randn(rows, tokens, 64), torch.randn(rows, tokens, 96)
        y, state = mixer(x, state, shared={"v_first": first})
        expected, expected_state = exact(x.double(), expected_state, shared={"v_first": first.double()})
        same(y, expected, 1e-5, "output")
        for part, tensor in expected_state.items():
            same(state[part], tensor, 1e-5, part)
    assert len(calls) == 4
    with pytest.raises(ArgumentError, match="v_first"):
        mixer(x, state)


@pytest.mark.parametrize("position", [0, 1_000_003])
def test_a_turn_is_exact_at_any_position(isa: str, position: int) -> None:
    mixer = build("retnet", {"num_heads": 2, "head_dim": 20, "v_head_dim": 12}, torch.float32)
    exact = copy.deepcopy(mixer).double()
    _, state = mixer(torch.randn(2, 3, mixer.d_model))
    state["position"] = torch.tensor([position, 5])
    x = torch.randn(2, 1, mixer.d_model)
    y, after = mixer(x, state)
    expected, expected_after = exact(
        x.double(), {n: t if n == "position" else t.double() for n, t in state.items()}
    )
    same(y, expected, 1e-5, "output")
    assert torch.equal(after["position"], expected_after["position"])


def test_no_state_is_changed_in_place() -> None:
    mixer = build("gated_deltanet", {}, torch.float32)
    with torch.no_grad():
        _, state = mixer(torch.randn(2, 5, mixer.d_model))
        before = {name: t.clone() for name, t in state.items()}
        mixer(torch.randn(2, 1, mixer.d_model), state)
    assert all(torch.equal(state[name], t) for name, t in before.items())


@pytest.mark.parametrize("name", sorted({name for name, _ in PLANNED}))
def test_a_state_of_another_shape_is_refused(name: str) -> None:
    """A kernel is given addresses: what it would read beside the state must not be reached."""
    mixer = build(name, {}, torch.float32)
    state = mixer.init_state(2)
    x = torch.randn(3, 1, mixer.d_model)
    with pytest.raises(ArgumentError, match=r"\[3, "):
        mixer(x, state)
    for part in state:
        wrong = {**mixer.init_state(3), part: state[part]}
        with pytest.raises((ArgumentError, RuntimeError)):
            mixer(x, wrong)
