"""Mixers between their projections on a GPU: one token in one launch, many in two, against the mixer's own torch path in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    if variant != "defaults"
    and (name == "rwkv7" or getattr(build(name, variants(name)[variant]), "plan", None) is not None)
]
PIECES = {torch.float32: (3, 1, 1, 36), torch.bfloat16: (17, 1)}
"""Tokens of the calls that a text is read in: several chunks, and single tokens."""
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
MANY = {
    **dict.fromkeys(("linear_transformer", "retnet"), {"forward": 1}),
    "rwkv7": {"shift": 1, "forward": 1, "rwkv7_behind": 1},
    **dict.fromkeys(("rwkv5", "rwkv6"), {"conv": 1, "forward": 1, "norm_gate": 1}),
}
"""Launches of a call with many tokens, where they are not one of the recurrence and one of the norm. ``conv``: the shift before the projections."""


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


@pytest.mark.parametrize("name, variant", PLANNED, ids=str)
def test_a_text_in_pieces(name: str, variant: str) -> None:
    for dtype, pieces in PIECES.items():
        mixer, exact = pair(name, variant, dtype)
        x = inputs(mixer, 2 if dtype is torch.float32 else 1, sum(pieces), dtype)
        state: Any = None
        outputs = []
        for piece in x.split(pieces, dim=1):
            (y, state), counted = launches(lambda piece=piece, before=state: mixer(piece.to(DEVICE), before))
            outputs.append(y.cpu())
            many = MANY.get(name, {"forward": 1, "norm_gate": 1})
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
