"""Law 2: reading ``a + b`` equals reading b from the state after a, at every cut, token by token included."""

from __future__ import annotations

import pytest
import torch

from laws.laws import BOUND, check_no_tokens, check_split_and_carry, check_state_matters, check_token_by_token
from laws.mixer_cases import decoder, decoder_subject, mixer_params, patterns, subject_of
from laws.op_cases import Sizes, accepted, bound_of, kernel, kernels, op_of, rooms

CHUNK_CUTS = (1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 139)


@pytest.mark.parametrize("name", [n for n in kernels() if n[1] != "step"], ids="-".join)
def test_every_cut_of_a_short_text(name: tuple[str, str, str]) -> None:
    for case in accepted(name, Sizes(T=12)):
        subject = case.subject(kernel(*name))
        check_split_and_carry(subject, range(13), bound_of(case))
        check_no_tokens(subject)


@pytest.mark.parametrize("name", [n for n in kernels() if n[1] == "chunked"], ids="-".join)
def test_cuts_around_the_chunks_of_a_longer_text(name: tuple[str, str, str]) -> None:
    for case in accepted(name, Sizes(B=1, T=140)):
        if "grouped" not in case.variant:
            check_split_and_carry(case.subject(kernel(*name)), CHUNK_CUTS, bound_of(case))


@pytest.mark.parametrize("name", [n for n in kernels() if n[1] == "step"], ids="-".join)
def test_steps_go_on_from_chunks_token_by_token(name: tuple[str, str, str]) -> None:
    op = op_of(name[0])
    for case in accepted(name, Sizes(T=12), reads=1):
        chunked, step = case.subject(lambda *a, **k: op(*a, form="chunked", **k)), case.subject(kernel(*name))
        check_token_by_token(chunked, bound_of(case), later=step)


@pytest.mark.parametrize("recurrence", rooms())
def test_a_state_of_one_kernel_is_a_state_of_every_other(recurrence: str) -> None:
    names = [n for n in kernels() if n[0] == recurrence and n[1] != "step"]
    definition = (recurrence, "recurrent", "torch")
    for name in names:
        if name == definition:
            continue
        for case in accepted(name, Sizes(B=1, T=70)):
            ours, theirs = (case.subject(kernel(*n), f", {'-'.join(n)}") for n in (name, definition))
            check_split_and_carry(ours, (66,), bound_of(case), later=theirs)
            check_split_and_carry(theirs, (66,), bound_of(case), later=ours)


@pytest.mark.parametrize(("name", "variant"), mixer_params())
def test_mixers(name: str, variant: str) -> None:
    subject = subject_of(name, variant, rows=2, tokens=12)
    check_state_matters(subject)
    check_no_tokens(subject)
    check_split_and_carry(subject, range(13), BOUND[torch.float64])
    check_token_by_token(subject, BOUND[torch.float64])
    long = subject_of(name, variant, rows=1, tokens=140, before=0)
    check_split_and_carry(long, (1, 63, 64, 65, 139), BOUND[torch.float64])
    # rounding once more or once less: what float32 can hold over a mixer's own sums
    check_split_and_carry(
        subject_of(name, variant, 1, 100, dtype=torch.float32), (64,), 10 * BOUND[torch.float32]
    )


@pytest.mark.parametrize("name", patterns())
def test_models(name: str) -> None:
    subject = decoder_subject(name, decoder(patterns()[name]), rows=2, tokens=12)
    check_state_matters(subject)
    check_split_and_carry(subject, range(1, 12), BOUND[torch.float64])
    check_token_by_token(subject, BOUND[torch.float64])
    if name == "hybrid":
        long = decoder_subject(name, decoder(patterns()[name]), rows=1, tokens=140, before=0)
        check_split_and_carry(long, (1, 64, 100, 139), BOUND[torch.float64])
