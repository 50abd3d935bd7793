"""Mixers between their projections on a GPU: one token in one launch, many in two, against the mixer's own torch path in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from laws.laws import BOUND, close
from laws.mixer_cases import build, by_definition, mixer_params, variants
from linstate.errors import ArgumentError
from linstate.mixers import Mixer
from linstate.ops import native_mixer
from linstate.ops.triton import mixer as mixer_programs
from linstate.ops.triton import runtime
from ops.triton_process import DEVICE, count_launches, serves

pytestmark = serves
PLANNED = [
    (name, variant)
    for name, variant in mixer_params()
    if getattr(build(name, variants(name)[variant]), "plan", None) is not None and variant != "defaults"
]
SPLIT = (13, 1, 1, 20)
"""Tokens of the calls that a text is read in: chunks and single tokens."""


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


@pytest.mark.parametrize("name, variant", PLANNED, ids=str)
def test_a_text_in_pieces(name: str, variant: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        bound = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
        mixer, exact = pair(name, variant, dtype)
        x = inputs(mixer, 2, sum(SPLIT), dtype)
        state: Any = None
        outputs = []
        for piece in x.split(SPLIT, dim=1):
            counted: dict[str, int] = {}

            def run(piece: Tensor = piece, before: Any = state) -> Any:
                return mixer(piece.to(DEVICE), before)

            results = []
            counted = count_launches(lambda run=run, results=results: results.append(run()))
            y, state = results[0]
            outputs.append(y.cpu())
            assert counted == ({"mixer_step": 1} if piece.shape[1] == 1 else {"forward": 1, "norm_gate": 1})
        with by_definition():
            expected, after = exact(x.double())
        close(torch.cat(outputs, 1), expected, bound, f"{name} ({variant}), {dtype}")
        for part, tensor in after.items():
            assert state[part].dtype == torch.float32
            close(state[part].cpu(), tensor, bound, f"{name} ({variant}), {dtype}: {part}")
