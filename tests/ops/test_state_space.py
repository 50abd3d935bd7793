"""The time-invariant state space over a long text, and its form as one convolution."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from laws.laws import BOUND, close
from laws.op_cases import Draw, Sizes, cases
from linstate.errors import ArgumentError
from linstate.mixers._state_space import StateSpaceMixer
from linstate.mixers.s4 import S4
from linstate.mixers.s4d import S4D
from linstate.ops import state_space
from linstate.ops.state_space.convolution import convolve, final_state, impulse_response

LONG = 100_000
VARIANTS = [case.variant for case in cases("state_space", Sizes())]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [S4, S4D])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@torch.no_grad()
def test_long_drift(kind: type[StateSpaceMixer], dtype: torch.dtype) -> None:
    """Law 8, without gates: 100,000 tokens in a mixer's own system, whose slowest state fades over 2,000."""
    torch.manual_seed(0)
    mixer = kind(3, 8)
    mixer.log_dt.copy_(torch.tensor([1e-3, 1e-2, 1e-1]).log())
    system = mixer.discretise().to(torch.float32)
    u = torch.randn(1, LONG, 3).to(dtype)
    start = torch.randn(1, 3, 4, 2)
    o, state = state_space(u, *system, initial_state=start)
    expected, after = state_space(u.double(), *system.to(torch.float64), initial_state=start.double())
    # float32: the slowest channel sums 2,000 tokens, each rounded
    bound = BOUND[dtype] * (10 if dtype == torch.float32 else 1)
    for channel in range(3):
        close(o[..., channel], expected[..., channel], bound, f"output of channel {channel}")
        close(o[:, -1000:, channel], expected[:, -1000:, channel], bound, f"its last outputs, {channel}")
        close(state[:, channel], after[:, channel], bound, f"state of channel {channel}")


@pytest.mark.parametrize("tokens", [0, 1, 5, 64, 129])
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_convolution_is_the_recurrence(variant: str, tokens: int) -> None:
    case = next(c for c in cases("state_space", Sizes(T=tokens)) if c.variant == variant)
    u, fixed = case.sequences["u"], case.fixed
    expected, after = state_space(u, **fixed, form="recurrent")
    kernel = impulse_response(**fixed, length=tokens)
    close(convolve(u, kernel), expected, BOUND[torch.float64], "output")
    given = {name: t for name, t in fixed.items() if name != "C"}
    close(final_state(u, **given), after, BOUND[torch.float64], "state")


def test_a_convolution_does_not_come_round() -> None:
    u, kernel = torch.zeros(1, 8, 1), torch.ones(1, 8)
    u[:, -1] = 1
    assert convolve(u, kernel)[0, :-1].abs().max() < 1e-6


def test_the_low_rank_has_two_sides() -> None:
    def pairs(*shape: int) -> Tensor:
        return Draw(0).normal(*shape, 2)

    A, B, C, a = (pairs(3, 4) for _ in range(4))
    with pytest.raises(ArgumentError, match="state_space: give both a and b, or neither"):
        state_space(Draw(0).normal(1, 5, 3), A, B, C, a)
