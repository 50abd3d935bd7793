"""What does not fit is refused: the error names the argument, what was expected and what came. Nothing is broadcast."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from laws.op_cases import Case, Sizes, cases, op_of, rooms
from linstate import ops
from linstate.errors import ArgumentError
from linstate.ops import causal_conv1d, delta_rule, selective_scan, softmax_attention

SIZES = Sizes(B=2, T=3, H=2, K=4, V=5)


def every_case() -> Iterator[Case]:
    for recurrence in rooms():
        yield from (case.to(torch.float32) for case in cases(recurrence, SIZES))


def message(case: Case, **options: Any) -> str | None:
    """What the ArgumentError of a call says; None if it is accepted."""
    try:
        case.run(op_of(case.recurrence), **options)
    except ArgumentError as error:
        return str(error)
    return None


def test_the_cases_themselves_are_accepted() -> None:
    for case in every_case():
        assert message(case) is None, case


def test_another_number_of_dimensions() -> None:
    for case in every_case():
        for name, tensor in case.tensors().items():
            for wrong in (tensor[..., None], tensor.new_zeros(())):
                said = message(case.replaced({name: wrong})) or ""
                assert said.startswith(f"{case.recurrence}: {name} must have the shape ["), (
                    f"{case}, {name}: {said}"
                )
                assert f"got {list(wrong.shape)}" in said, f"{case}, {name}: {said}"


def wrong_sizes(tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
    """One axis longer, or of size 1 (which a careless op broadcasts)."""
    for axis, size in enumerate(tensor.shape):
        yield axis, torch.cat([tensor, tensor.narrow(axis, 0, min(1, size))], axis)
        if size > 1:
            yield axis, tensor.narrow(axis, 0, 1)


def test_a_size_that_does_not_fit_is_never_broadcast() -> None:
    for case in every_case():
        if case.variant.startswith("width 1"):
            continue  # its state has no place, so that nothing contradicts another width
        for name, tensor in case.tensors().items():
            for axis, wrong in wrong_sizes(tensor):
                if name in ("x", "u") and axis == 1:
                    continue  # the only argument with a time axis
                if name == "share":
                    continue  # its size is that of a mini-batch, which nothing else says
                if case.variant == "window of one" and name.startswith("initial_state") and axis == 1:
                    continue  # an empty cache stays empty
                said = message(case.replaced({name: wrong}))
                assert said, f"{case}: {name} {list(wrong.shape)} for {list(tensor.shape)} was accepted"
                assert said.startswith(f"{case.recurrence}: "), said
                # where a first argument is wrong, the next one contradicts it
                assert ("must" in said and re.search(r"got .*\[?\d", said)) or "multiple" in said, said
                if name not in ("q", "k", "v", "x", "u", "A"):
                    assert name.split(".")[0] in said or "initial_state" in said, f"{case}, {name}: {said}"


def test_another_dtype() -> None:
    for case in every_case():
        for name, tensor in case.tensors().items():
            for dtype in (torch.int64, torch.bool, torch.complex64):
                said = message(case.replaced({name: tensor.to(dtype)})) or ""
                assert said == f"{case.recurrence}: {name} must be a floating point tensor, got {dtype}", (
                    f"{case}: {said}"
                )


def test_another_device() -> None:
    for case in every_case():
        tensors = case.tensors()
        if len(tensors) < 2:
            continue
        first = "v" if case.recurrence == "selective_scan" else next(iter(tensors))
        for name, tensor in tensors.items():
            if name != first:
                said = message(case.replaced({name: tensor.to("meta")}))
                assert said == f"{case.recurrence}: {name} is on meta, but {first} is on cpu", (
                    f"{case}: {said}"
                )


def test_what_is_no_tensor() -> None:
    for case in every_case():
        for name in (*case.sequences, *(n for n, x in case.fixed.items() if isinstance(x, Tensor))):
            broken = replace(
                case,
                sequences={n: [1.0] if n == name else t for n, t in case.sequences.items()},
                fixed={n: [1.0] if n == name else t for n, t in case.fixed.items()},
            )
            with pytest.raises(ArgumentError, match=rf"{case.recurrence}: {name} must .* got list"):
                op = op_of(case.recurrence)
                missing = dict.fromkeys(("q", "k")) if case.recurrence == "selective_scan" else {}
                op(**{**missing, **broken.sequences, **broken.fixed})


@pytest.mark.parametrize("recurrence", rooms())
def test_an_initial_state_of_another_dtype_or_kind(recurrence: str) -> None:
    case = cases(recurrence, SIZES)[0].to(torch.float32)
    if recurrence == "softmax_attention":
        with pytest.raises(ArgumentError, match="initial_state must be a KVCache, got Tensor"):
            softmax_attention(**case.sequences, initial_state=case.initial.k)
        float_length = case.initial._replace(length=case.initial.length.float())
        with pytest.raises(
            ArgumentError, match=r"initial_state\.length must be int64 on cpu, got torch\.float32"
        ):
            softmax_attention(**case.sequences, initial_state=float_length)
        return
    if isinstance(case.initial, dict):
        for name, tensor in case.initial.items():
            for dtype in (torch.bfloat16, torch.float64):
                said = message(replace(case, initial={**case.initial, name: tensor.to(dtype)})) or ""
                expected = tensor.dtype if tensor.is_floating_point() else "int64"
                assert said.startswith(f"{recurrence}: initial_state.{name} must be {expected}"), said
                assert f"got {dtype}" in said
            lost = {n: t for n, t in case.initial.items() if n != name}
            assert "initial_state must hold" in (message(replace(case, initial=lost)) or "")
        assert "initial_state must be a tensor" in (message(replace(case, initial=[1.0])) or "")
        said = message(replace(case, initial={**case.initial, "count": case.initial["count"] + 5})) or ""
        assert said.startswith(f"{recurrence}: initial_state.count must lie in [0, 5), got [")
        return
    for dtype in (torch.bfloat16, torch.float64):
        said = message(replace(case, initial=case.initial.to(dtype)))
        assert said == (
            f"{recurrence}: initial_state must be torch.float32 (float64 for float64 inputs, else float32), got {dtype}"
        )
    wide = case.to(torch.float64)
    assert "initial_state must be torch.float64" in (
        message(replace(wide, initial=wide.initial.float())) or ""
    )
    assert "initial_state must be a tensor" in (message(replace(case, initial=[1.0])) or "")


@pytest.mark.parametrize("recurrence", rooms())
def test_unknown_form_and_backend(recurrence: str) -> None:
    case = cases(recurrence, SIZES)[0]
    assert message(case, form="parallel") == (
        f"{recurrence}: form must be 'auto' or one of recurrent, chunked, step, got 'parallel'"
    )
    assert message(case, backend="cuda") == (
        f"{recurrence}: backend must be 'auto' or one of triton, native, torch, got 'cuda'"
    )


@pytest.mark.parametrize("recurrence", rooms())
def test_a_step_takes_one_token(recurrence: str) -> None:
    said = f"{recurrence}: form 'step' takes one token (T=1, no cu_seqlens), got T="
    assert message(cases(recurrence, replace(SIZES, T=2))[0], form="step") == f"{said}2"
    assert message(cases(recurrence, replace(SIZES, T=0))[0], form="step") == f"{said}0"
    packed = cases(recurrence, replace(SIZES, B=1, T=1))[0]
    assert message(packed, form="step") is None
    assert message(packed, form="step", cu_seqlens=torch.tensor([0, 1])) == f"{said}1"


@pytest.mark.parametrize("recurrence", rooms())
def test_malformed_boundaries(recurrence: str) -> None:
    case = replace(cases(recurrence, replace(SIZES, B=1, T=5))[0], initial=None)
    for wrong, said in (
        ([0, 5], "cu_seqlens must be a tensor [N + 1], got list"),
        (
            torch.tensor([0.0, 5.0]),
            "cu_seqlens must be int32 or int64 [N + 1] with N >= 1, got torch.float32 [2]",
        ),
        (
            torch.tensor([[0, 5]]),
            "cu_seqlens must be int32 or int64 [N + 1] with N >= 1, got torch.int64 [1, 2]",
        ),
        (torch.tensor([5]), "cu_seqlens must be int32 or int64 [N + 1] with N >= 1, got torch.int64 [1]"),
        (torch.tensor([1, 5]), "cu_seqlens must rise from 0 to T=5, got [1, 5]"),
        (torch.tensor([0, 4]), "cu_seqlens must rise from 0 to T=5, got [0, 4]"),
        (torch.tensor([0, 6]), "cu_seqlens must rise from 0 to T=5, got [0, 6]"),
        (torch.tensor([0, 3, 2, 5]), "cu_seqlens must rise from 0 to T=5, got [0, 3, 2, 5]"),
        (torch.tensor([0, -1, 5]), "cu_seqlens must rise from 0 to T=5, got [0, -1, 5]"),
    ):
        found = message(case, cu_seqlens=wrong) or ""
        assert found.startswith(f"{recurrence}: {said}"), found
    assert message(case, cu_seqlens=torch.tensor([0, 2, 5], dtype=torch.int32)) is None
    two_rows = replace(cases(recurrence, replace(SIZES, T=5))[0], initial=None)
    assert message(two_rows, cu_seqlens=torch.tensor([0, 5])) == (
        f"{recurrence}: with cu_seqlens the sequences are packed along T and B must be 1, got B=2"
    )


@pytest.mark.parametrize("recurrence", rooms())
def test_as_many_initial_states_as_packed_sequences(recurrence: str) -> None:
    case = cases(recurrence, replace(SIZES, B=1, T=5))[0]
    three = cases(recurrence, replace(SIZES, B=3))[0].initial
    assert message(replace(case, initial=three), cu_seqlens=torch.tensor([0, 2, 2, 5])) is None
    said = message(replace(case, initial=three), cu_seqlens=torch.tensor([0, 2, 5])) or ""
    assert re.match(rf"{recurrence}: initial_state must hold .*2 (packed sequences|rows)", said), said
    assert re.search(r"got (3|k \[3)", said), said


def test_what_only_one_op_asks() -> None:
    x, weight, attention = torch.zeros(1, 3, 4), torch.zeros(4, 2), cases("softmax_attention", SIZES)[0]
    with pytest.raises(ArgumentError, match="causal_conv1d: activation must be None or 'silu', got 'gelu'"):
        causal_conv1d(x, weight, activation="gelu")
    with pytest.raises(ArgumentError, match="softmax_attention: window must be at least 1 token, got 0"):
        softmax_attention(**attention.sequences, window=0)
    v = torch.zeros(1, 3, 1, 4)
    with pytest.raises(ArgumentError, match="selective_scan: give both q and k, or neither"):
        selective_scan(None, v, v, v)
    q, three = torch.zeros(1, 3, 2, 4), torch.zeros(1, 3, 3, 4)
    with pytest.raises(
        ArgumentError, match=re.escape("the heads of v (3) must be a multiple of the heads of q and k (2)")
    ):
        delta_rule(q, q, three, torch.zeros(1, 3, 3))
    with pytest.raises(
        ArgumentError, match=r"g must have the shape \[Hv\] or \[B, T, Hv\] or \[B, T, Hg, K\], got \[1, 3\]"
    ):
        delta_rule(q, q, q, torch.zeros(1, 3, 2), torch.zeros(1, 3))


def test_the_same_arguments_in_the_same_order_for_every_op() -> None:
    """q, k, v first; what every op takes is keyword only and named the same."""
    for recurrence in rooms():
        parameters = inspect.signature(op_of(recurrence)).parameters
        shared = ["initial_state", "cu_seqlens", "form", "backend"]
        last = [
            name for name in parameters if name != "snapshots"
        ]  # of those that have chunks to take them at
        assert last[-4:] == shared, recurrence
        assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in shared), recurrence
        if recurrence not in ("causal_conv1d", "state_space"):  # of one input, x or u
            assert list(parameters)[:3] == ["q", "k", "v"], recurrence
        assert recurrence in ops.__all__
