"""Law 8: 100,000 steps in bfloat16 stay within bound of float64; extreme gates give no NaN, no Inf, and are right."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from laws.laws import BOUND, answer, check_drift, check_extremes, exempt
from laws.op_cases import Case, Draw, Sizes, cases, definition, kernel, kernels, refusal, with_gradients
from linstate.errors import BackendError

LONG = 100_000
PIECES = (0, 500, 33_333, 33_833, 66_001, 99_501, LONG)
SIZE = 16
EXTREME = -1e4
GATED = [n for n in kernels() if n[1] == "chunked" and not exempt(n[0], "long_drift")]


def regimes(draw: Draw, tokens: int, channels: int) -> Tensor:
    """Log gates ``[1, T, 4, channels]``, a regime for each head: none, very slow, mixed, nothing or everything."""
    shape = (1, tokens, channels)
    cut = torch.where(draw.uniform(*shape) < 0.02, EXTREME, 0.0)
    return torch.stack(
        [torch.zeros(shape, dtype=torch.float64), -1e-4 * draw.uniform(*shape), draw.gates(*shape), cut], 2
    )


def long_call(recurrence: str, tokens: int) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """Arguments but the gates, gates per head and per channel, and an initial state; four heads, one for each regime."""
    draw, heads = Draw(5), (1, tokens, 4, SIZE)
    b = draw.unit(*heads)
    given: dict[str, dict[str, Any]] = {
        "linear_attention": {"k": draw.normal(*heads)},
        "delta_rule": {"k": draw.unit(*heads), "beta": draw.uniform(1, tokens, 4)},
        "dplr": {"k": draw.normal(*heads, scale=0.3), "a": -b * draw.uniform(*heads, high=0.9), "b": b},
        "selective_scan": {"k": draw.normal(*heads)},
    }
    sequences = {"q": draw.normal(*heads), "v": draw.normal(*heads), **given[recurrence]}
    return sequences, regimes(draw, tokens, 1), regimes(draw, tokens, SIZE), draw.normal(1, 4, SIZE, SIZE)


def true_answer(case: Case) -> tuple[Tensor, Tensor]:
    """What float64 makes of a long call: read in pieces that end nowhere near a chunk, the short ones by the definition, too."""
    case = case.to(torch.float64)
    chunked, outputs, state = kernel(case.recurrence, "chunked", "torch"), [], case.initial
    for start, end in zip(PIECES, PIECES[1:], strict=False):
        piece = replace(case.piece(start, end), initial=state)
        o, state = piece.run(chunked)
        outputs.append(o)
        if piece.tokens <= 500:
            check_drift(
                (o, state),
                piece.run(definition(case.recurrence)),
                BOUND[torch.float64],
                f"{piece}, from {start}",
            )
    return torch.cat(outputs, 1), state


@cache
def long_cases(recurrence: str) -> list[tuple[Case, tuple[Tensor, Tensor]]]:
    """Calls in bfloat16 with gates per head and per channel, and what float64 makes of exactly these values."""
    sequences, per_head, per_channel, initial = long_call(recurrence, LONG)
    gates = {"gate per channel": per_channel}
    if recurrence != "selective_scan":
        gates["gate per head"] = per_head[..., 0]
    calls = [
        Case(recurrence, variant, {**sequences, "g": g}, {}, initial).to(torch.bfloat16)
        for variant, g in gates.items()
    ]
    # for the truth, both are heads of one call
    both = {name: torch.cat([call.sequences[name] for call in calls], 2) for name in sequences}
    both["g"] = torch.cat(
        [
            g if g.dim() == 4 else g[..., None].expand(per_channel.shape)
            for g in (c.sequences["g"] for c in calls)
        ],
        2,
    )
    o, state = true_answer(Case(recurrence, "all", both, {}, torch.cat([call.initial for call in calls], 1)))
    heads = [slice(4 * i, 4 * i + 4) for i in range(len(calls))]
    return [(call, (o[:, :, own], state[:, own])) for call, own in zip(calls, heads, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("name", GATED, ids="-".join)
def test_long_drift(name: tuple[str, str, str]) -> None:
    for case, expected in long_cases(name[0]):
        try:
            found = case.run(kernel(*name))
        except BackendError as error:
            pytest.skip(str(error))
        check_drift(found, expected, BOUND[torch.bfloat16], str(case))


def extreme_gates(draw: Draw, like: Tensor, sign: float) -> dict[str, Tensor]:
    """Gates (``sign`` -1), or step sizes (``sign`` 1), that forget everything, nothing, or now one and now the other."""
    far, chance = torch.full_like(like, abs(EXTREME)), draw.uniform(*like.shape)
    gates = {
        "forgets everything": far,
        "forgets nothing": torch.zeros_like(like),
        "all or nothing": torch.where(chance < 0.5, far, 0.0),
        "now and then": torch.where(chance < 0.04, far, 1e-3),
    }
    return {name: sign * g for name, g in gates.items()}


def extreme_cases(recurrence: str) -> Iterator[Case]:
    """Every variant with a gate and extreme gates; the delta rule with rates of 0, 1 and 2; over two chunks."""
    draw = Draw(9)
    for case in cases(recurrence, Sizes(B=1, T=100, K=SIZE, V=SIZE)):
        if "grouped" in case.variant or "negative" in case.variant:
            continue
        if "beta" in case.sequences:
            beta = case.sequences["beta"]
            rates = {str(rate): torch.full_like(beta, rate) for rate in (0.0, 1.0, 2.0)}
            rates["0, 1 or 2"] = (3 * draw.uniform(*beta.shape)).floor()
            for name, rate in rates.items():
                yield replace(case.replaced({"beta": rate}), variant=f"{case.variant}, beta {name}")
        g = case.tensors().get("g")
        if g is not None:
            sign = 1.0 if "A" in case.fixed else -1.0
            for name, gate in extreme_gates(draw, g, sign).items():
                changed = {
                    "g": gate,
                    **(
                        {"beta": torch.full_like(case.sequences["beta"], 2.0)}
                        if "beta" in case.sequences
                        else {}
                    ),
                }
                yield replace(case.replaced(changed), variant=f"{case.variant}, {name}")


@cache
def prepared(recurrence: str, dtype: torch.dtype) -> list[tuple[Case, dict[str, Tensor]]]:
    found = [case.to(dtype) for case in extreme_cases(recurrence)]
    return [(case, answer(definition(recurrence), case.to(torch.float64), gradients=True)) for case in found]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", GATED, ids="-".join)
def test_extreme_gates(name: tuple[str, str, str], dtype: torch.dtype) -> None:
    op, taken = kernel(*name), 0
    for case, expected in prepared(name[0], dtype):
        torch_takes_all = name[2] == "torch"
        if torch_takes_all or refusal(op, case) is None:
            differentiable = torch_takes_all or refusal(op, with_gradients(case)) is None
            # with a rate of 2 keys are reflected: every rounding error is kept for ever
            check_extremes(op, case, expected, 3 * BOUND[dtype], gradients=differentiable)
            taken += 1
    if not taken:
        pytest.skip(f"{'-'.join(name)} takes no {dtype} call on this machine")
