"""States: nothing given is written to, kept in float32 (float64 for float64), and no state is the empty one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from laws.laws import (
    check_purity,
    check_state_dtype,
    close,
    exempt,
    identical,
    identical_state,
    leaves,
    rebuild,
    same_state,
)
from laws.mixer_cases import build, decoder, decoder_subject, mixer_params, patterns, subject_of, variants
from laws.op_cases import Sizes, accepted, bound_of, cases, kernel, kernels, op_of, refusal, rooms

DTYPES = {
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}
SUMMED_BESIDE_A_CACHE = {"conv", "h", "before", "waiting"}
"""What a mixer of softmax attention carries beside its keys: states like any other."""


@pytest.mark.parametrize("name", kernels(), ids="-".join)
def test_ops_write_to_nothing_they_are_given(name: tuple[str, str, str]) -> None:
    for case in accepted(name, Sizes(T=1 if name[1] == "step" else 70 if name[1] == "chunked" else 6)):
        check_purity(case.subject(kernel(*name)))


@pytest.mark.parametrize("name", [n for n in kernels() if not exempt(n[0], "state_dtype")], ids="-".join)
def test_states_of_ops_are_float32(name: tuple[str, str, str]) -> None:
    for master in cases(name[0], Sizes(T=1 if name[1] == "step" else 4)):
        for dtype, expected in DTYPES.items():
            case = master.to(dtype)
            for given in (case, replace(case, initial=None)):
                if refusal(kernel(*name), given) is None:
                    o, state = given.run(kernel(*name))
                    assert o.dtype == dtype, f"{case}: output is {o.dtype}"
                    check_state_dtype(state, expected, str(case))


@pytest.mark.parametrize("recurrence", [r for r in rooms() if exempt(r, "state_dtype")])
def test_a_cache_keeps_the_dtype_of_its_keys(recurrence: str) -> None:
    for master in cases(recurrence, Sizes(T=4)):
        for dtype in DTYPES:
            for given in (master.to(dtype), replace(master.to(dtype), initial=None)):
                check_state_dtype(given.run(op_of(recurrence))[1], dtype, str(master))


@pytest.mark.parametrize("name", kernels(), ids="-".join)
def test_no_state_is_a_state_of_zeros(name: tuple[str, str, str]) -> None:
    for case in accepted(name, Sizes(T=1 if name[1] == "step" else 5)):
        empty = replace(case, initial=rebuild(case.initial, torch.zeros_like))
        (o, state), (expected, after) = (
            replace(case, initial=None).run(kernel(*name)),
            empty.run(kernel(*name)),
        )
        close(o, expected, bound_of(case), f"{case}: no initial state: output")
        if exempt(name[0], "state_dtype"):  # a cache whose places are all empty may be shorter
            continue
        same_state(state, after, bound_of(case), f"{case}: no initial state")


@pytest.mark.parametrize(("name", "variant"), mixer_params())
def test_mixers(name: str, variant: str) -> None:
    subject = subject_of(name, variant, rows=2, tokens=20)
    check_purity(subject)
    keeps = exempt(build(name, {}).recurrence, "state_dtype")
    for dtype, expected in DTYPES.items():
        mixer = build(name, variants(name)[variant], dtype)
        x = subject.inputs["x"].to(dtype)
        y, state = mixer(x)
        assert y.dtype == dtype, f"{name}: output is {y.dtype}"
        for when, held in (("after reading", state), ("empty", mixer.init_state(2))):
            cache = {part: t for part, t in held.items() if keeps and part not in SUMMED_BESIDE_A_CACHE}
            rest = {part: t for part, t in held.items() if part not in cache}
            check_state_dtype(cache, dtype, f"{name}, {when}")
            check_state_dtype(rest, expected, f"{name}, {when}")
        again, after = mixer(x, mixer.init_state(2))
        identical(again, y, f"{name}: from init_state")
        identical_state(after, state, f"{name}: from init_state")
        assert {k: t.shape[0] for k, t in leaves(state).items()} == dict.fromkeys(state, 2), (
            f"{name}: batch first"
        )


@pytest.mark.parametrize("name", patterns())
def test_models(name: str) -> None:
    check_purity(decoder_subject(name, decoder(patterns()[name]), rows=2, tokens=20))
