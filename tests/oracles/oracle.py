"""Implementations that were not written here, brought to where they run without a GPU, and how ours is held to them.

Hugging Face's modeling files take FLA's Triton kernels where FLA is installed, and then fail on a machine
without a GPU; under each such function its own torch implementation is kept as ``__wrapped__``
(:func:`hf_module`). FLA's packages cannot be imported without Triton, and take long; the files of its naive
references need only torch and einops, so they are loaded by their path (:func:`fla_naive`).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from linstate.bench import peers

BOUND = 1e-4
"""Largest deviation allowed in float32, relative to the largest entry of what is expected."""

TOKENS, CUT = 77, 41
"""Lengths that are multiples of nothing."""


def deviation(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest entry of ``expected``."""
    assert found.shape == expected.shape, f"{list(found.shape)} instead of {list(expected.shape)}"
    assert expected.abs().max() > 0, "nothing to compare: all is zero"
    return ((found - expected).abs().max() / expected.abs().max()).item()


def agree(what: str, found: Tensor, expected: Tensor) -> None:
    off = deviation(found, expected)
    assert off <= BOUND, f"{what}: off by {off:.1e}, allowed are {BOUND:.0e}"


def hf_module(family: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The modeling file of a transformers family, with its torch functions in place of kernels of other packages."""
    pytest.importorskip("transformers", reason="extra 'hf' is not installed")
    with monkeypatch.context() as hidden:
        hidden.setitem(
            sys.modules, "fla", None
        )  # importing it takes ten seconds, and nothing of it runs here
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    for name, value in list(vars(module).items()):  # it may have been imported before, with FLA's kernels
        plain = getattr(value, "__wrapped__", None)
        if plain is not None and value.__module__ == module.__name__:
            monkeypatch.setattr(module, name, plain)
    return module


def fla_naive(path: str) -> ModuleType:
    """The file ``fla/ops/<path>.py``."""
    module = peers.fla_naive(path)
    if module is None:
        pytest.skip("FLA's references, or einops, are not installed (extra 'oracles')")
    return module


def randomise(module: nn.Module, **values: Callable[[Tensor], Tensor]) -> None:
    """Weights at which nothing fades or vanishes: 1/sqrt(fan in) for matrices, around one for the scales of norms.

    ``values``: for parameters whose name ends so, what makes the new value from a uniform sample in [0, 1).
    """
    with torch.no_grad():
        for name, p in module.named_parameters():
            make = next((make for end, make in values.items() if name.endswith(end)), None)
            if make is not None:
                p.copy_(make(torch.rand_like(p)))
            elif p.dim() > 1:
                p.normal_(std=(p[0].numel()) ** -0.5)
            elif name.endswith("weight"):
                p.uniform_(0.5, 1.5)
            else:
                p.normal_(std=0.3)


Layer = Callable[[Tensor, Mapping[str, Tensor] | None], tuple[Tensor, Mapping[str, Tensor]]]


def hold(ours: Layer, expected: list[tuple[Tensor, Mapping[str, Tensor]]], pieces: list[Tensor]) -> None:
    """``ours`` reads the pieces from state to state and must agree with the (output, state) expected after each.

    It must also agree when it reads the first two pieces at once, and must not when the state between is dropped.
    """
    state: Mapping[str, Tensor] | None = None
    for number, (x, (y, after)) in enumerate(zip(pieces, expected, strict=True)):
        found, state = ours(x, state)
        agree(f"output of piece {number}", found, y)
        for name, tensor in after.items():
            agree(f"{name} after piece {number}", state[name], tensor)
    found, state = ours(torch.cat(pieces[:2], dim=1), None)
    agree("output of two pieces at once", found, torch.cat([expected[0][0], expected[1][0]], dim=1))
    for name, tensor in expected[1][1].items():
        agree(f"{name} after two pieces at once", state[name], tensor)
    lost, _ = ours(pieces[1], None)
    assert deviation(lost, expected[1][0]) > 100 * BOUND, "a lost state would not be seen here"


def pieces(width: int, batch: int = 2) -> list[Tensor]:
    """Input in three pieces, the last of one token."""
    x = torch.randn(batch, TOKENS + 1, width)
    return [x[:, :CUT], x[:, CUT:TOKENS], x[:, TOKENS:]]


def causal(tokens: int) -> Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()


def by_pieces(y: Tensor, inputs: list[Tensor]) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """What is expected of each piece, from the output for the whole."""
    return [(part, {}) for part in y.split([x.shape[1] for x in inputs], dim=1)]
