"""Triton's programs of the recurrences on a matrix state against the float64 definition: outputs, states, gradients, launches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from laws.laws import BOUND, answer, check_extremes, check_one_answer, check_packing, close
from laws.op_cases import Case, Draw, Sizes, cases, definition, kernel
from laws.test_long_drift import extreme_gates
from linstate.errors import ArgumentError, BackendError
from linstate.ops import dispatch
from linstate.ops.triton import matrix, runtime, table
from linstate.ops.triton.step import step_in_slots
from ops.triton_process import DEVICE, count_launches, on_device, serves

pytestmark = serves
KINDS = matrix.KINDS
GATES = ("no gate", "gate per head", "gate per channel")
SMALL = Sizes(B=1, T=35, H=1, K=17, V=20)  # two chunks and a bit, sizes that are padded


def true(case: Case, *, gradients: bool) -> dict[str, Tensor]:
    return answer(definition(case.recurrence), case.to(torch.float64), gradients=gradients)


def chosen(recurrence: str, sizes: Sizes, variants: tuple[str, ...] = GATES) -> list[Case]:
    return [case for case in cases(recurrence, sizes) if case.variant in variants]


@pytest.mark.parametrize("recurrence", KINDS)
def test_float32(recurrence: str) -> None:
    """Every kind of gate, grouped heads, a bonus."""
    for case in cases(recurrence, SMALL):
        cast = case.to(torch.float32)
        check_one_answer(
            on_device(recurrence, "chunked"), cast, true(cast, gradients=True), BOUND[torch.float32]
        )


@pytest.mark.parametrize("recurrence", KINDS)
def test_bfloat16(recurrence: str) -> None:
    """Gates in float32, as the mixers make them."""
    for case in chosen(recurrence, replace(SMALL, T=67), (*GATES, "gate per head, bonus")):
        cast = case.to(torch.bfloat16, gates=torch.float32)
        check_one_answer(
            on_device(recurrence, "chunked"), cast, true(cast, gradients=True), BOUND[torch.bfloat16]
        )


@pytest.mark.parametrize("recurrence", KINDS)
def test_float16(recurrence: str) -> None:
    for case in chosen(recurrence, SMALL, GATES[1:2]):
        cast = case.to(torch.float16)
        found = answer(on_device(recurrence, "chunked"), cast, gradients=False)
        for name, expected in true(cast, gradients=False).items():
            close(found[name], expected, 2e-3, f"{cast}: {name}")


@pytest.mark.parametrize("recurrence", KINDS)
def test_the_largest_heads(recurrence: str) -> None:
    for case in chosen(recurrence, Sizes(B=1, T=18, H=1, K=256, V=256), GATES[1:2]):
        cast = case.to(torch.float32)
        expected = true(cast, gradients=False)
        check_one_answer(
            on_device(recurrence, "chunked"), cast, expected, BOUND[torch.float32], gradients=False
        )


@pytest.mark.parametrize("recurrence", KINDS)
def test_extreme_gates_and_rates(recurrence: str) -> None:
    draw = Draw(9)
    for case in chosen(recurrence, replace(SMALL, K=16, V=16), GATES[1:]):
        gates = extreme_gates(draw, case.sequences["g"], -1.0)
        for name in ("all or nothing", "now and then"):
            changed = {"g": gates[name]}
            if recurrence == "delta_rule":
                changed["beta"] = (3 * draw.uniform(*case.sequences["beta"].shape)).floor()  # 0, 1 or 2
            cast = case.replaced(changed).to(torch.float32)
            expected = true(cast, gradients=True)
            op = on_device(recurrence, "chunked")
            check_extremes(op, cast, expected, 3 * BOUND[torch.float32], gradients=True)


@pytest.mark.parametrize("recurrence", KINDS)
def test_packed_sequences(recurrence: str) -> None:
    for case in chosen(recurrence, replace(SMALL, B=4, T=20), GATES[2:]):
        cast = case.to(torch.float32)
        check_packing(cast.subject(on_device(recurrence, "chunked")), (3, 0, 20, 1), BOUND[torch.float32])


def packed_gradients(op: Any, recurrence: str, case: Case) -> list[Tensor]:
    """Gradients of a packed call of three sequences, one of them empty."""
    bounds = torch.tensor([0, 20, 20, 35])
    given = {name: t.clone().requires_grad_() for name, t in case.tensors().items()}
    start = given["initial_state"].expand(3, *given["initial_state"].shape[1:])
    o, state = replace(case.replaced(given), initial=start).run(op, cu_seqlens=bounds)
    weights = torch.Generator().manual_seed(1)
    total = sum((t.double() * torch.randn(t.shape, generator=weights)).sum() for t in (o, state))
    return list(torch.autograd.grad(total, list(given.values())))


@pytest.mark.parametrize("recurrence", KINDS)
def test_gradients_of_packed_sequences(recurrence: str) -> None:
    (case,) = chosen(recurrence, SMALL, GATES[1:2])
    cast = case.to(torch.float32)
    expected = packed_gradients(definition(recurrence), recurrence, cast.to(torch.float64))
    found = packed_gradients(on_device(recurrence, "chunked"), recurrence, cast)
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        close(ours, theirs, BOUND[torch.float32], f"{cast}, packed: gradient {number}")


@pytest.fixture
def segmented(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chip so large, and segments so short, that a short text is cut."""
    monkeypatch.setattr(runtime, "processors", lambda index: 1000)
    monkeypatch.setattr(table, "segments", partial(table.segments, least=32))


@pytest.mark.usefixtures("segmented")
@pytest.mark.parametrize("recurrence", KINDS)
def test_segments(recurrence: str) -> None:
    sizes = replace(SMALL, T=100)
    for case in chosen(recurrence, sizes, GATES[1:]):
        cast = case.to(torch.float32)
        learns = case.variant == "gate per head"
        op = on_device(recurrence, "chunked")
        counted = count_launches(lambda cast=cast, op=op: cast.run(op))
        assert counted == {"prepare": 1, "forward": 2, "combine": 1}, "the text was not cut"
        check_one_answer(op, cast, true(cast, gradients=learns), BOUND[torch.float32], gradients=learns)


@pytest.mark.usefixtures("segmented")
def test_segments_of_packed_sequences() -> None:
    (case,) = chosen("delta_rule", replace(SMALL, B=2, T=70), GATES[1:2])
    cast = case.to(torch.float32)
    check_packing(cast.subject(on_device("delta_rule", "chunked")), (3, 70), BOUND[torch.float32])


@pytest.mark.parametrize("recurrence", KINDS)
def test_launches(recurrence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two for inference, four for training, one for a step; nobody launches but ``runtime.launch``."""
    (case,) = chosen(recurrence, replace(SMALL, T=20), GATES[1:2])
    cast = case.to(torch.float32)
    made: list[str] = []
    if DEVICE == "cpu":
        from triton.runtime.interpreter import GridExecutor

        before = GridExecutor.__call__

        def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
            made.append(self.fn.__name__)
            return before(self, *args, **kwargs)

        monkeypatch.setattr(GridExecutor, "__call__", spy)
    assert count_launches(lambda: cast.run(on_device(recurrence, "chunked"))) == {"prepare": 1, "forward": 1}
    one = cast.piece(0, 1)
    assert count_launches(lambda: one.run(on_device(recurrence, "step"))) == {"step": 1}
    learned = count_launches(lambda: answer(on_device(recurrence, "chunked"), cast, gradients=True))
    assert learned == {"prepare": 1, "forward": 1, "sweep": 1, "gradients": 1}
    if DEVICE == "cpu":
        assert made == ["prepare", "forward", "step", "prepare", "forward", "sweep", "gradients"]


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that is allocated is full of NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("recurrence", KINDS)
def test_poisoned_memory(recurrence: str) -> None:
    """Everything that is read was written, everything that is returned too."""
    case = cases(recurrence, SMALL)[-1]  # grouped heads, a gate per channel
    cast = case.to(torch.float32)
    check_one_answer(on_device(recurrence, "chunked"), cast, true(cast, gradients=True), BOUND[torch.float32])


@pytest.mark.parametrize("recurrence", [*KINDS, "selective_scan"])
@pytest.mark.parametrize("packed", [False, True])
def test_snapshots(recurrence: str, packed: bool) -> None:
    """The states behind every so many tokens are those of reading so far, at no more launches; the rest of a short row are its final state."""
    names = ("with A",) if recurrence == "selective_scan" else GATES[1:2]
    (case,) = chosen(recurrence, replace(SMALL, B=1 if packed else 2, T=70, K=5, V=6), names)
    cast = case.to(torch.float32)
    op, exact = on_device(recurrence, "chunked"), definition(recurrence)
    bounds = [0, 0, 66, 70] if packed else [0, 70]
    start = cast.initial.repeat(3, 1, 1, 1) if packed else cast.initial
    of_packed = {"cu_seqlens": torch.tensor(bounds)} if packed else {}
    results: list[Any] = []
    counted = count_launches(
        lambda: results.append(replace(cast, initial=start).run(op, snapshots=64, **of_packed))
    )
    _, states = results[0]
    assert sum(counted.values()) == (1 if recurrence == "selective_scan" else 2)
    assert states.shape[:2] == (3 if packed else 2, 2)
    for row, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        for number in (0, 1):
            stop = min(begin + 64 * (number + 1), end)
            _, expected = cast.piece(begin, stop).run(exact) if stop > begin else (None, cast.initial)
            found = states[row : row + 1, number] if packed else states[:, number]
            close(found.cpu(), expected, 1e-5, f"{recurrence}: row {row}, snapshot {number}")


@pytest.mark.parametrize("recurrence", KINDS)
def test_steps(recurrence: str) -> None:
    for case in cases(recurrence, Sizes(B=2, T=1, H=2, K=17, V=20)):
        for dtype in (torch.float32, torch.bfloat16):
            cast = case.to(dtype)
            expected = true(cast, gradients=False)
            check_one_answer(on_device(recurrence, "step"), cast, expected, BOUND[dtype], gradients=False)


@pytest.mark.parametrize("recurrence", KINDS)
def test_steps_in_slots(recurrence: str) -> None:
    """A row's state is updated where it lies, other slots and rows left out are not touched."""
    (case,) = chosen(recurrence, Sizes(B=3, T=1, H=2, K=17, V=20), GATES[2:])
    cast = case.to(torch.float32)
    o, after = cast.run(definition(recurrence))
    states = torch.full((5, *cast.initial.shape[1:]), float("nan"), device=DEVICE)
    states[4], states[1] = cast.initial[0].to(DEVICE), cast.initial[2].to(DEVICE)
    slots = torch.tensor([4, -1, 1], device=DEVICE)
    sequences = {name: t.to(DEVICE) for name, t in cast.sequences.items()}
    out = torch.empty_like(sequences["v"])
    found = step_in_slots(recurrence, states, slots, out=out, **sequences)
    assert found.data_ptr() == out.data_ptr()
    close(found.cpu()[[0, 2]], o[[0, 2]], 1e-6, f"{recurrence}: output")
    close(states[[4, 1]].cpu(), after[[0, 2]], 1e-6, f"{recurrence}: states")
    assert not found[1].any(), "a row without a slot has no output"
    assert states[[0, 2, 3]].isnan().all(), "a slot that nobody named was written to"
    with pytest.raises(ArgumentError, match="slots must be"):
        step_in_slots(recurrence, states, slots[:2], **sequences)
    with pytest.raises(ArgumentError, match="states must be"):
        step_in_slots(recurrence, states.bfloat16(), slots, **sequences)


@pytest.mark.parametrize("recurrence", KINDS)
def test_torch_compile_and_fake_tensors_pass_through(recurrence: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    (case,) = chosen(recurrence, replace(SMALL, T=5), GATES[1:2])
    cast = case.to(torch.float32)
    op = kernel(recurrence, "chunked", "triton")
    given = {name: t.to(DEVICE) for name, t in cast.tensors().items()}
    function = torch.compile(lambda **tensors: op(**tensors), backend="aot_eager", fullgraph=False)
    expected = op(**given)
    for found, wanted in zip(function(**given), expected, strict=True):
        assert torch.equal(found, wanted)
    with FakeTensorMode() as mode:
        fake = op(**{name: mode.from_tensor(t) for name, t in given.items()})
    assert [(t.shape, t.dtype) for t in fake] == [(t.shape, t.dtype) for t in expected]


def test_refusals() -> None:
    (case,) = chosen("delta_rule", replace(SMALL, T=3), GATES[:1])
    op = kernel("delta_rule", "chunked", "triton")
    with pytest.raises(BackendError, match="float64"):
        case.run(op)
    (large,) = chosen("delta_rule", replace(SMALL, T=3, K=257), GATES[:1])
    with pytest.raises(BackendError, match="256"):
        large.to(torch.float32).run(op)


@pytest.mark.skipif(DEVICE != "cpu", reason="of the interpreter")
def test_the_interpreter_serves_only_when_asked() -> None:
    (case,) = chosen("delta_rule", replace(SMALL, T=3), GATES[:1])
    call = {**case.to(torch.float32).sequences, "g": None, "tokens": 3, "asked": "auto"}
    assert dispatch.choose("delta_rule", "chunked", "auto", call).backend != "triton"


def test_precision_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert runtime.precision(torch.float32) == "tf32x3"
    monkeypatch.setenv("LINSTATE_TRITON_PRECISION", "ieee")
    assert runtime.precision(torch.float32) == "ieee"
    monkeypatch.setenv("LINSTATE_TRITON_PRECISION", "tf16")
    with pytest.raises(ArgumentError, match="tf16"):
        runtime.precision(torch.float32)


def test_a_broken_decay_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests can fail: gates that are off by a hundredth of a percent are."""
    (case,) = chosen("linear_attention", SMALL, GATES[2:])
    cast = case.to(torch.float32)
    wrong = cast.replaced({"g": cast.sequences["g"] * 1.0001})
    with pytest.raises(AssertionError, match="off by"):
        check_one_answer(
            on_device("linear_attention", "chunked"),
            wrong,
            true(cast, gradients=False),
            BOUND[torch.float32],
            gradients=False,
        )
