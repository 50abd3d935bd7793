"""Law 1: every form and backend equals the float64 definition: output, state and gradients."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from laws.laws import BOUND, answer, check_gradients, check_one_answer, close, entries, leaves, loss_of
from laws.mixer_cases import build, by_definition, mixer_params, mixer_subject, variants
from laws.op_cases import TINY, WIDE, Case, Sizes, cases, definition, kernel, kernels, refusal, with_gradients

# dtype of the inputs, dtype of the gates, numbers of tokens: around a chunk of 64 and beyond two. Where a chunk
# ends has nothing to do with the dtype, so the lengths are tried in one of them.
DTYPES = {
    "float32": (torch.float32, torch.float32, (1, 5, 64, 65, 150)),
    "bfloat16": (torch.bfloat16, torch.bfloat16, (1, 65, 150)),
    "bfloat16, gates float32": (torch.bfloat16, torch.float32, (1, 65)),
}
LONGEST_LOOP = 65  # enough for the definition itself in another dtype


@cache
def prepared(recurrence: str, dtype: str, tokens: int) -> list[tuple[Case, dict[str, Tensor]]]:
    """Cases in ``dtype`` and what the float64 definition makes of exactly these (rounded) values."""
    found = cases(recurrence, Sizes(T=tokens), seed=tokens)
    if tokens not in (1, WIDE.T):
        found = [c for c in found if "grouped" not in c.variant]  # has nothing to do with where a chunk ends
    else:
        found += [
            replace(c, variant=f"{c.variant}, wide heads")
            for c in cases(recurrence, replace(WIDE, T=tokens))
            if "grouped" not in c.variant
        ]
    result = []
    for case in found:
        rounded = case.to(DTYPES[dtype][0], gates=DTYPES[dtype][1])
        result.append((rounded, answer(definition(recurrence), rounded.to(torch.float64), gradients=True)))
    return result


@pytest.mark.parametrize("name", kernels(), ids="-".join)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kernel_equals_the_definition(name: tuple[str, str, str], dtype: str) -> None:
    recurrence, form, backend = name
    op, taken, reason = kernel(*name), 0, ""
    inputs, _, lengths = DTYPES[dtype]
    for tokens in lengths:
        if (form == "step" and tokens > 1) or (form == "recurrent" and tokens > LONGEST_LOOP):
            continue
        for case, expected in prepared(recurrence, dtype, tokens):
            if backend != "torch" and (why := refusal(op, case)):
                reason = why
                continue
            taken += 1
            differentiable = backend == "torch" or refusal(op, with_gradients(case)) is None
            check_one_answer(op, case, expected, BOUND[inputs], gradients=differentiable)
    if not taken:
        pytest.skip(f"{'-'.join(name)} takes no {dtype} call on this machine: {reason}")


@pytest.mark.parametrize("name", kernels(), ids="-".join)
def test_gradients_by_finite_differences(name: tuple[str, str, str]) -> None:
    recurrence, form, backend = name
    op, reason, taken = kernel(*name), "", 0
    for sizes in (TINY, replace(TINY, T=67)) if form != "step" else (replace(TINY, T=1),):
        if form == "recurrent" and sizes.T > TINY.T:
            continue  # the definition has no chunk whose boundary could be wrong
        for case in cases(recurrence, sizes):
            if sizes.T > TINY.T and "grouped" in case.variant:
                continue  # how heads are grouped has nothing to do with chunks
            if backend != "torch" and (why := refusal(op, with_gradients(case))):
                reason = why
                continue
            taken += 1
            check_gradients(op, case, fast=sizes.T > TINY.T)
    if not taken:
        pytest.skip(f"{'-'.join(name)} is not differentiable in float64: {reason}")


@pytest.mark.parametrize(("name", "variant"), mixer_params())
def test_mixers_give_what_the_definitions_give(name: str, variant: str) -> None:
    """Output, state and the gradients of every weight, of the input and of the state; float32 against float64."""
    found = []
    for dtype, how in ((torch.float32, nullcontext), (torch.float64, by_definition)):
        mixer = build(name, variants(name)[variant], torch.float32).to(dtype).requires_grad_()
        subject = mixer_subject(name, mixer, rows=2, tokens=70)
        x = subject.inputs["x"].float().to(dtype).requires_grad_()
        state = {
            key: t.float().to(dtype) if t.is_floating_point() else t for key, t in subject.initial.items()
        }
        given = {
            "x": x,
            **{key: t for key, t in state.items() if t.is_floating_point()},
            **dict(mixer.named_parameters()),
        }
        for tensor in given.values():
            tensor.requires_grad_()
        with how():
            y, after = mixer(x, state)
            by = torch.autograd.grad(loss_of(y, after), list(given.values()), allow_unused=True)
        assert set(leaves(after)) == set(mixer.init_state(1)), f"{name}: state after {set(leaves(after))}"
        gradients = {
            f"gradient {key}": torch.zeros_like(t) if g is None else g
            for (key, t), g in zip(given.items(), by, strict=True)
        }
        found.append({"output": y, **{f"state {key}": t for key, t in entries(after).items()}, **gradients})
    steepest = max(float(t.abs().max()) for key, t in found[1].items() if "gradient" in key)
    for key, tensor in found[1].items():
        # a mixer is several sums, norms and gates deep
        close(found[0][key], tensor, 10 * BOUND[torch.float32], f"{name} ({variant}): {key}", size=steepest)


@pytest.mark.parametrize(("name", "variant"), mixer_params())
def test_mixers_in_bfloat16(name: str, variant: str) -> None:
    """Weights and inputs in bfloat16: the state stays wide, and the answer is that of float64 up to bfloat16's rounding."""
    narrow = build(name, variants(name)[variant], torch.bfloat16)
    wide = build(name, variants(name)[variant], torch.bfloat16).double()
    x = torch.randn(2, 70, narrow.d_model, generator=torch.Generator().manual_seed(3)).bfloat16()
    y, _ = narrow(x)
    assert y.dtype == torch.bfloat16
    with by_definition():
        expected, _ = wide(x.double())
    # q, k, v and the gates are themselves rounded to bfloat16 on the way: 2 ** -9 each, through norms and products
    close(y, expected, 5 * BOUND[torch.bfloat16], f"{name} ({variant}): output in bfloat16")
