"""Triton's programs of the elementwise scan and the short convolution against the float64 definition."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from laws.laws import BOUND, answer, check_extremes, check_one_answer, check_packing, check_token_by_token
from laws.op_cases import Draw, Sizes, cases, definition
from laws.test_long_drift import extreme_gates
from linstate.ops.triton import runtime, scan, table
from ops.triton_process import count_launches, on_device, serves

pytestmark = serves
SMALL = Sizes(B=1, T=20, H=1, K=5, V=18)
OPS = ("selective_scan", "causal_conv1d")


@pytest.mark.parametrize("recurrence", OPS)
def test_every_variant(recurrence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "SPAN", 8)  # the states that gradients begin from
    for case in cases(recurrence, SMALL):
        for dtype in (torch.float32, torch.bfloat16):
            if dtype is torch.bfloat16 and case.variant not in ("with A", "width 4, bias, silu"):
                continue
            cast = case.to(dtype, gates=torch.float32)
            expected = answer(definition(recurrence), cast.to(torch.float64), gradients=True)
            check_one_answer(on_device(recurrence, "chunked"), cast, expected, BOUND[dtype])


@pytest.mark.parametrize("recurrence", OPS)
def test_steps(recurrence: str) -> None:
    for case in cases(recurrence, replace(SMALL, B=2, T=6)):
        if case.variant in ("with A, grouped heads", "without q, k and A", "width 4, bias, silu", "width 1"):
            cast = case.to(torch.float32)
            op = on_device(recurrence, "chunked")
            later = cast.subject(on_device(recurrence, "step"))
            check_token_by_token(cast.subject(op), BOUND[torch.float32], later=later)


@pytest.mark.parametrize("recurrence", OPS)
def test_packed_sequences(recurrence: str) -> None:
    for case in cases(recurrence, replace(SMALL, B=4)):
        if case.variant in ("with A", "width 4, bias, silu"):
            cast = case.to(torch.float32)
            subject = cast.subject(on_device(recurrence, "chunked"))
            check_packing(subject, (3, 0, 20, 1), BOUND[torch.float32])


def test_extreme_gates() -> None:
    for case in cases("selective_scan", SMALL):
        if case.variant in ("with A", "without A"):
            sign = 1.0 if "A" in case.fixed else -1.0
            for gate in extreme_gates(Draw(9), case.sequences["g"], sign).values():
                cast = case.replaced({"g": gate}).to(torch.float32)
                expected = answer(definition("selective_scan"), cast.to(torch.float64), gradients=True)
                op = on_device("selective_scan", "chunked")
                check_extremes(op, cast, expected, 3 * BOUND[torch.float32], gradients=True)


def test_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "processors", lambda index: 1000)
    monkeypatch.setattr(table, "segments", partial(table.segments, least=8))
    monkeypatch.setattr(scan, "SPAN", 8)
    for case in cases("selective_scan", SMALL):
        cast = case.to(torch.float32)
        op = on_device("selective_scan", "chunked")
        assert count_launches(lambda cast=cast, op=op: cast.run(op)) == {"scan": 2, "combine": 1}
        expected = answer(definition("selective_scan"), cast.to(torch.float64), gradients=True)
        check_one_answer(op, cast, expected, BOUND[torch.float32])


@pytest.mark.parametrize(("recurrence", "names"), [("selective_scan", "scan"), ("causal_conv1d", "conv")])
def test_launches(recurrence: str, names: str) -> None:
    cast = cases(recurrence, SMALL)[0].to(torch.float32)
    op = on_device(recurrence, "chunked")
    assert count_launches(lambda: cast.run(op)) == {names: 1}
    assert count_launches(lambda: answer(op, cast, gradients=True)) == {names: 1, f"{names}_gradients": 1}


def test_poisoned_memory() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        for recurrence in OPS:
            cast = cases(recurrence, SMALL)[1].to(torch.float32)
            expected = answer(definition(recurrence), cast.to(torch.float64), gradients=True)
            check_one_answer(on_device(recurrence, "chunked"), cast, expected, BOUND[torch.float32])
    finally:
        torch.use_deterministic_algorithms(False)
