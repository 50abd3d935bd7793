"""Nothing escapes the laws: every room, kernel and mixer that exists has cases; every exemption is of something."""

from __future__ import annotations

import pytest
import torch

from laws import laws
from laws.laws import EXEMPT
from laws.mixer_cases import build, mixer_params, variants
from laws.op_cases import GENERATORS, Sizes, cases, definition, kernel, kernels, op_of, refusal, rooms
from linstate import mixers
from linstate.ops import dispatch


def test_every_recurrence_of_the_table_has_cases() -> None:
    for recurrence in {name for name, _, _ in kernels()} | set(rooms()):
        assert recurrence in GENERATORS, f"add a generator for {recurrence} to op_cases.py"
        assert cases(recurrence, Sizes()), recurrence


@pytest.mark.parametrize("recurrence", rooms())
def test_every_room_has_its_definition_chunks_and_step(recurrence: str) -> None:
    assert callable(op_of(recurrence))
    for form in dispatch.FORMS:
        assert (recurrence, form, "torch") in dispatch.TABLE, f"{recurrence} has no {form} form on torch"


@pytest.mark.parametrize("name", kernels(), ids="-".join)
def test_torch_accepts_everything(name: tuple[str, str, str]) -> None:
    if name[2] != "torch":
        pytest.skip("only torch must accept everything")
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for case in cases(name[0], Sizes(T=1 if name[1] == "step" else 3)):
            assert refusal(kernel(*name), case.to(dtype)) is None, case


def test_definitions_are_plain_torch() -> None:
    for recurrence in rooms():
        run = dispatch.TABLE[recurrence, "recurrent", "torch"].run
        assert run.__module__ == f"linstate.ops.{recurrence}.definition"
        assert definition(recurrence)


def test_every_mixer_is_tried() -> None:
    assert mixers.names()
    assert {name for name, _ in mixer_params()} == set(mixers.names())
    for name in mixers.names():
        assert mixers.find(name).recurrence in rooms(), f"{name} rests on no recurrence that is tried"
        for options in variants(name).values():
            build(name, options)


def test_exemptions_are_of_something_and_say_why() -> None:
    known = {name.removeprefix("check_") for name in vars(laws) if name.startswith("check_")}
    for name, by_law in EXEMPT.items():
        assert name in {*rooms(), *mixers.names()}, f"{name} does not exist"
        for law, reason in by_law.items():
            assert any(law in check or check in law for check in known) or law == "long_drift", law
            assert len(reason) > 20, f"{name}, {law}: say why"
