"""Mixers between their projections on a GPU: one token in one launch, many in four, against the mixer's own torch path in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from laws.laws import close
from laws.mixer_cases import build, by_definition, mixer_params, randomise, variants
from linstate.errors import ArgumentError
from linstate.mixers import Mixer
from linstate.mixers.base import Place
from linstate.mixers.rwkv7 import RWKV7
from linstate.ops.fused import Operands, Plan
from linstate.ops.triton import mixer as mixer_programs
from linstate.ops.triton import runtime, rwkv, table
from ops.triton_process import DEVICE, count_launches, serves

pytestmark = serves
PLANNED = {
    name: variant
    for name, variant in mixer_params()  # grouped heads come last, where a mixer has them
    if variant != "defaults"
    and (name == "rwkv7" or getattr(build(name, variants(name)[variant]), "plan", None) is not None)
}
PIECES = {torch.float32: (2, 1, 34), torch.bfloat16: (5, 1)}
"""Tokens of the calls that a text is read in: several chunks, and single tokens."""
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
RECURRENCE = {"prepare": 1, "forward": 1}
MANY = {
    "linear_transformer": RECURRENCE,
    "retnet": RECURRENCE,
    "gla": {**RECURRENCE, "norm_gate": 1},
    "rwkv7": {"shift": 1, **RECURRENCE, "rwkv7_behind": 1},
}
"""Launches of a call with many tokens, where they are not a convolution (in RWKV-5 and 6 the shift), those of the recurrence, and the norm."""


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(runtime, "interpreter_serves", True)
    with torch.no_grad():
        yield


def pair(name: str, variant: str, dtype: torch.dtype) -> tuple[Mixer, Mixer]:
    """The mixer, and the same weights in float64."""
    mixer = build(name, variants(name)[variant], dtype)
    exact = build(name, variants(name)[variant])
    for weights, given in zip(exact.parameters(), mixer.parameters(), strict=True):
        weights.copy_(given)
    return mixer.to(DEVICE), exact


def inputs(mixer: Mixer, rows: int, tokens: int, dtype: torch.dtype) -> Tensor:
    draw = torch.Generator().manual_seed(3)
    return torch.randn(rows, tokens, mixer.d_model, generator=draw, dtype=torch.float64).to(dtype)


def launches(call: Callable[[], Any]) -> tuple[Any, dict[str, int]]:
    """What a call returns, and how often each program was launched."""
    results: list[Any] = []
    counted = count_launches(lambda: results.append(call()))
    return results[0], counted


@pytest.mark.parametrize("name", PLANNED)
def test_a_text_in_pieces(name: str) -> None:
    variant = PLANNED[name]
    for dtype, pieces in PIECES.items():
        mixer, exact = pair(name, variant, dtype)
        x = inputs(mixer, 1, sum(pieces), dtype)
        state: Any = None
        outputs = []
        for piece in x.split(pieces, dim=1):
            (y, state), counted = launches(partial(mixer, piece.to(DEVICE), state))
            outputs.append(y.cpu())
            many = MANY.get(name, {"conv": 1, **RECURRENCE, "norm_gate": 1})
            one = {"shift": 1, "rwkv7_step": 1} if name == "rwkv7" else {"mixer_step": 1}
            assert counted == (one if piece.shape[1] == 1 else many)
        with by_definition():
            expected, after = exact(x.double())
        what = f"{name} ({variant}), {dtype}"
        close(torch.cat(outputs, 1), expected, LIMIT[dtype], what)
        for part, tensor in after.items():
            if tensor.is_floating_point():
                assert state[part].dtype == torch.float32
                close(state[part].cpu(), tensor, LIMIT[dtype], f"{what}: {part}")


def test_values_mixed_with_the_first_layer() -> None:
    """RWKV-7's later layers."""
    place = Place(layer=1, layers=2, first=False)
    for dtype in (torch.float32, torch.bfloat16):
        mixer, exact = (
            randomise(RWKV7(64, 2, 16, place=place)).to(kind).eval().requires_grad_(False)
            for kind in (dtype, torch.float64)
        )
        for weights, given in zip(exact.parameters(), mixer.parameters(), strict=True):
            weights.copy_(given)
        x = inputs(mixer, 1, 19, dtype)
        first = torch.randn(1, 19, 32, generator=torch.Generator().manual_seed(4)).to(dtype)
        y, state = mixer.to(DEVICE)(x[:, :18].to(DEVICE), shared={"v_first": first[:, :18].to(DEVICE)})
        (last, state), counted = launches(
            lambda mixer=mixer, x=x, state=state, first=first: mixer(
                x[:, 18:].to(DEVICE), state, shared={"v_first": first[:, 18:].to(DEVICE)}
            )
        )
        assert counted == {"shift": 1, "rwkv7_step": 1}
        with by_definition():
            expected, after = exact(x.double(), shared={"v_first": first.double()})
        close(torch.cat([y, last], 1).cpu(), expected, LIMIT[dtype], f"{dtype}")
        close(state["S"].cpu(), after["S"], LIMIT[dtype], f"{dtype}: state")


@pytest.mark.parametrize("name", ["gated_deltanet", "mamba2", "rwkv7"])
def test_packed_sequences(name: str) -> None:
    """One after the other in one call, an empty one and one of a single token among them."""
    mixer, exact = pair(name, "several heads", torch.float32)
    bounds = torch.tensor([0, 3, 3, 20, 21])
    x = inputs(mixer, 1, 21, torch.float32)
    with by_definition():
        _, before = exact(inputs(exact, 4, 3, torch.float32).double())
        expected, after = exact(x.double(), before, cu_seqlens=bounds)
    start = {part: t.float().to(DEVICE) for part, t in before.items()}
    y, state = mixer(x.to(DEVICE), start, cu_seqlens=bounds.to(DEVICE))
    close(y.cpu(), expected, 1e-5, name)
    for part, tensor in after.items():
        close(state[part].cpu(), tensor, 1e-5, f"{name}: {part}")


def test_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chip so large, and segments so short, that a short text is cut; the convolution's state comes from the last."""
    monkeypatch.setattr(runtime, "processors", lambda index: 1000)
    monkeypatch.setattr(table, "segments", partial(table.segments, least=32))
    mixer, exact = pair("gated_deltanet", "several heads", torch.float32)
    x = inputs(mixer, 1, 66, torch.float32)
    (y, state), counted = launches(lambda: mixer(x.to(DEVICE)))
    assert counted == {"conv": 1, "prepare": 1, "forward": 2, "combine": 1, "norm_gate": 1}
    with by_definition():
        expected, after = exact(x.double())
    close(y.cpu(), expected, 1e-5, "output")
    for part, tensor in after.items():
        close(state[part].cpu(), tensor, 1e-5, part)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that is allocated is full of NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", ["gated_deltanet", "rwkv7"])
def test_in_slots(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """States are updated where they lie, in one launch into given memory; slots and rows that are left out are not touched."""
    mixer, _ = pair(name, "several heads", torch.float32)
    x = inputs(mixer, 3, 4, torch.float32).to(DEVICE)
    _, state = mixer(x[:, :3])
    expected, after = mixer(x[:, 3:], state)
    slots = torch.tensor([4, -1, 1], device=DEVICE)
    pool = {part: t.new_full((5, *t.shape[1:]), float("nan")) for part, t in state.items()}
    for part, t in state.items():
        pool[part][[4, 1]] = t[[0, 2]]
    out = torch.full((3, 1, mixer.out_proj.in_features), float("nan"), device=DEVICE)

    def mixed(plan: Any, projected: Tensor, matrix: Any, tail: Any, operands: Any) -> Any:
        work = mixer_programs.Workspace(plan, 3, DEVICE)
        for _ in range(2):  # the counters are as they were
            again = {part: t.clone() for part, t in pool.items()}
            call = (plan, projected, slots, again["S"], again["conv"], operands)
            y, counted = launches(partial(mixer_programs.step_in_slots, *call, out=out, workspace=work))
            assert counted == {"mixer_step": 1} and y.data_ptr() == out.data_ptr()
            assert not work.arrived.any()
        pool.update(again)
        return y, None, None

    def time_mix(operands: Any, eps: float, matrix: Any, bounds: Any) -> Any:
        y, counted = launches(lambda: rwkv.step_in_slots(operands, eps, slots, pool["S"], out=out))
        assert counted == {"rwkv7_step": 1} and y.data_ptr() == out.data_ptr()
        return y, None

    monkeypatch.setattr(mixer_programs, "step", mixed)
    monkeypatch.setattr(rwkv, "time_mix", time_mix)
    y, _ = mixer(x[:, 3:], state)
    close(y[[0, 2]].cpu(), expected[[0, 2]].cpu(), 1e-6, "output")
    assert not out[1].any(), "a row without a slot has no output"
    for part in ("S", "conv") if name == "gated_deltanet" else ("S",):
        close(pool[part][[4, 1]].cpu(), after[part][[0, 2]].cpu(), 1e-6, part)
        assert pool[part][[0, 2, 3]].isnan().all(), "a slot that nobody named was written to"


def test_what_does_not_fit_in_slots() -> None:
    mixer, _ = pair("gated_deltanet", "several heads", torch.float32)
    plan = mixer.plan
    assert isinstance(plan, Plan)
    mixed = torch.zeros(2, 1, mixer.in_proj.out_features, device=DEVICE)
    states = torch.zeros(4, plan.hv, plan.k, plan.v, device=DEVICE)
    tails = torch.zeros(4, plan.conv[2] - 1, plan.conv[1], device=DEVICE)
    slots = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    operands = Operands()
    for wrong, what in (
        ((mixed.expand(2, 2, -1), slots, states, tails), "mixed must be"),
        ((mixed, slots[:1], states, tails), "slots must be"),
        ((mixed, slots, states.bfloat16(), tails), "states must be"),
        ((mixed, slots, states, tails[:2]), "tails must be"),
        ((mixed, slots, states, None), "tails must hold"),
    ):
        with pytest.raises(ArgumentError, match=what):
            mixer_programs.step_in_slots(plan, *wrong, operands)
    small = mixer_programs.Workspace(plan, 1, DEVICE)
    with pytest.raises(ArgumentError, match="fewer than 2 rows"):
        mixer_programs.step_in_slots(plan, mixed, slots, states, tails, operands, workspace=small)


def test_training_is_left_to_the_ops() -> None:
    mixer, _ = pair("gated_deltanet", "several heads", torch.float32)
    mixer.requires_grad_()
    with torch.enable_grad():
        (y, _), counted = launches(lambda: mixer(inputs(mixer, 1, 4, torch.float32).to(DEVICE)))
        y.sum().backward()
    assert "norm_gate" not in counted and counted["forward"] == 1
    assert all(p.grad is not None for p in mixer.parameters())


def test_a_broken_mixer_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests can fail: a unit length with another eps is seen."""
    mixer, exact = pair("gated_deltanet", "several heads", torch.float32)
    assert isinstance(mixer.plan, Plan)
    monkeypatch.setattr(mixer, "plan", replace(mixer.plan, unit_eps=1e-2))
    x = inputs(mixer, 1, 5, torch.float32)
    with by_definition():
        expected, _ = exact(x.double())
    for tokens in (1, 5):
        y, _ = mixer(x[:, :tokens].to(DEVICE))
        with pytest.raises(AssertionError, match="off by"):
            close(y.cpu(), expected[:, :tokens], 1e-5, "output")
