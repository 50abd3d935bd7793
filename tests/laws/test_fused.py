"""The laws on fused mixers: every kernel of the table, in the dtypes in which people run them, and each time the one that was meant."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from laws.laws import (
    BOUND,
    Subject,
    check_causality,
    check_packing,
    check_rows,
    check_split_and_carry,
    identical,
    take,
)
from laws.mixer_cases import build, variants
from linstate import mixers
from linstate.mixers._planned import PlannedMixer
from linstate.ops import dispatch, fused, native

PLANNED = [
    (name, variant)
    for name in mixers.names()
    if issubclass(mixers.find(name), PlannedMixer) and name != "deltaproduct"  # which has a path of its own
    for variant in ("defaults", "several heads", "grouped heads")
    if variant in variants(name)
]
KERNELS = [key for key in sorted(dispatch.TABLE) if key[0] == "fused" and key[2] != "triton"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Of a mixer between its projections in bfloat16: roundings of q, k and v add up before the norm, as in tests/mixers.
SLACK = {torch.float32: 10.0, torch.bfloat16: 3.0}


def subject(
    name: str, variant: str, kernel: tuple[str, str, str], dtype: torch.dtype, rows: int, tokens: int
) -> Subject:
    """A mixer between its projections, with one kernel; it fails where another kernel ran."""
    mixer = build(name, variants(name)[variant], dtype)
    assert isinstance(mixer, PlannedMixer)
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 5 + tokens, mixer.d_model, generator=draw).to(dtype)
    one = kernel[1] == "step"

    def read(inputs: dict[str, Tensor], state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        state = state or {}
        mixed, operands, after = by_rows(mixer, inputs["x"], state, cu_seqlens)
        with dispatch.recorded() as ran:
            y, after["S"], tail = fused(
                mixer.plan,
                mixed,
                operands,
                matrix=state.get("S"),
                tail=state.get("conv"),
                cu_seqlens=cu_seqlens,
                form=kernel[1],
                backend=kernel[2],
            )
        assert ran[0] == kernel, f"{ran[0]} ran instead of {kernel}"
        return y, {**after, "conv": tail} if mixer.plan.conv[2] else after

    with torch.no_grad():
        initial = mixer(x[:, :5])[1]
    x = x[:, 5 : 6 if one else None]
    return Subject(f"{name} ({variant}), {kernel}, {dtype}", read, {"x": x}, initial)


def by_rows(
    mixer: PlannedMixer, x: Tensor, state: Any, cu_seqlens: Tensor | None
) -> tuple[Tensor, Any, dict[str, Tensor]]:
    """The projections, row by row: torch's products of several rows in float32 depend on what the others hold."""
    if cu_seqlens is not None or len(x) == 1:
        return mixer.project(x, state, cu_seqlens)
    made = [mixer.project(x[i : i + 1], take(state, slice(i, i + 1)) or {}, None) for i in range(len(x))]
    operands = made[0][1]
    for name in ("beta", "step", "z", "key", "value", "position"):
        if getattr(operands, name) is not None:
            operands = replace(operands, **{name: torch.cat([getattr(one[1], name) for one in made])})
    after = {name: torch.cat([one[2][name] for one in made]) for name in made[0][2]}
    return torch.cat([one[0] for one in made]), operands, after


def served(name: str, variant: str, kernel: tuple[str, str, str]) -> None:
    if kernel[2] == "native":
        if not native.available:
            pytest.skip("no native kernels")
        if kernel[1] == "chunked" and not build(name, variants(name)[variant]).plan.of_many:
            pytest.skip("one token only")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", KERNELS, ids="-".join)
@pytest.mark.parametrize(("name", "variant"), PLANNED)
def test_laws_of_rows_packing_causality_and_cuts(
    name: str, variant: str, kernel: tuple[str, str, str], dtype: str
) -> None:
    served(name, variant, kernel)
    kind = DTYPES[dtype]
    bound = BOUND[kind] * SLACK[kind]
    check_rows(subject(name, variant, kernel, kind, 3, 12), bound)
    if kernel[1] == "step":
        return
    tokens = 70 if kernel[1] == "chunked" else 6
    check_causality(subject(name, variant, kernel, kind, 2, tokens), (0, 1, tokens - 1))
    check_packing(subject(name, variant, kernel, kind, 3, tokens), (3, tokens, 1), bound)
    check_split_and_carry(subject(name, variant, kernel, kind, 1, tokens), (1, tokens - 6), bound)


@pytest.mark.parametrize(("name", "variant"), PLANNED)
def test_what_a_mixer_says_is_what_runs(name: str, variant: str, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("LINSTATE_LOG", "ops")
    monkeypatch.setattr(dispatch, "_said", set())
    mixer = build(name, variants(name)[variant], torch.float32)
    x = torch.randn(1, 3, mixer.d_model)
    with torch.no_grad(), dispatch.recorded() as ran:
        _, state = mixer(x)
        many, ran[:] = list(ran), []
        mixer(x[:, :1], state)
    ops_of = [key for key in ran if key[0] != "causal_conv1d"]  # a shift of tokens is one
    assert "fused" in {key[0] for key in many} and ops_of[0][:2] == ("fused", "step")
    said = capsys.readouterr().err
    assert f"fused step: {ops_of[0][2]}" in said
    if native.available:
        assert ops_of == [("fused", "step", "native")]
        assert f"{mixer.recurrence} step" not in said  # nothing that did not run


def broken(kernel: tuple[str, str, str], how: str) -> dispatch.Kernel:
    """The kernel with a mistake."""
    good = dispatch.TABLE[kernel]

    def run(plan: Any, mixed: Tensor, matrix: Any, tail: Any, of: Any, *rest: Any) -> Any:
        if how == "forgets":
            return good.run(plan, mixed, None, tail, of, *rest)
        y, after, tail = good.run(plan, mixed, matrix, tail, of, *rest)
        if how == "looks ahead":
            return y + 1e-3 * mixed[:, -1:].mean(-1, keepdim=True), after, tail
        return (
            y + 1e-3 * y.mean(0, keepdim=True).mean(1, keepdim=True),
            after,
            tail,
        )  # mixes rows and packed texts

    return replace(good, run=run)


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k[1] == "chunked"], ids="-".join)
def test_the_laws_bite(kernel: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    served("gla", "defaults", kernel)
    bound = BOUND[torch.float32] * SLACK[torch.float32]
    checks = {
        "looks ahead": lambda s: check_causality(s, (0, 1, 69)),
        "mixes": lambda s: check_rows(s, bound),
        "mixes packed": lambda s: check_packing(s, (3, 70, 1), bound),
        "forgets": lambda s: check_split_and_carry(s, (1, 64), bound),
    }
    for how, check in checks.items():
        rows = 1 if how == "forgets" else 3
        made = subject("gla", "defaults", kernel, torch.float32, rows, 70)
        check(made)
        with monkeypatch.context() as patch:
            patch.setitem(dispatch.TABLE, kernel, broken(kernel, how))
            with pytest.raises(AssertionError):
                check(made)


def test_the_definition_is_what_training_uses() -> None:
    mixer = build("gated_deltanet", {}, torch.float32).requires_grad_()
    x = torch.randn(2, 9, mixer.d_model)
    with dispatch.recorded() as ran:
        y, _ = mixer(x)
    assert ran[0] == ("fused", "chunked", "torch") and y.requires_grad
    with torch.no_grad(), dispatch.recorded() as ran:
        again, _ = mixer.double()(x.double())
    assert ran[0] == ("fused", "chunked", "torch")
    assert torch.allclose(y.double(), again, atol=1e-5)
    identical(y.detach().double().float(), y.detach(), "y")
