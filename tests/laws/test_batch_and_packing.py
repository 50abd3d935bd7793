"""Law 5: a row's result does not depend on its neighbours; ``cu_seqlens`` equals separate calls; padding changes nothing."""

from __future__ import annotations

import pytest
import torch

from laws.laws import BOUND, check_packing, check_padding, check_rows
from laws.mixer_cases import decoder, decoder_subject, mixer_params, patterns, random_tokens, subject_of
from laws.op_cases import Sizes, accepted, bound_of, kernel, kernels

KERNELS = [n for n in kernels() if n[1] != "step"]


@pytest.mark.parametrize("name", kernels(), ids="-".join)
def test_rows_of_ops(name: tuple[str, str, str]) -> None:
    for case in accepted(name, Sizes(B=3, T=1 if name[1] == "step" else 20)):
        check_rows(case.subject(kernel(*name)), bound_of(case))


@pytest.mark.parametrize("name", KERNELS, ids="-".join)
def test_packed_ops(name: tuple[str, str, str]) -> None:
    """Sequences without a token, too, and one that is longer than a chunk."""
    for case in accepted(name, Sizes(B=4, T=70 if name[1] == "chunked" else 6)):
        longest = case.tokens
        check_packing(case.subject(kernel(*name)), (3, 0, longest, 1), bound_of(case))
        if case.variant == "no gate":
            check_packing(case.subject(kernel(*name)), (0, 2, 5, 0), bound_of(case))


@pytest.mark.parametrize(("name", "variant"), mixer_params())
def test_mixers(name: str, variant: str) -> None:
    check_rows(subject_of(name, variant, rows=3, tokens=20), BOUND[torch.float64])
    check_packing(subject_of(name, variant, rows=4, tokens=70), (3, 70, 0, 1), BOUND[torch.float64])


@pytest.mark.parametrize("name", patterns())
def test_models(name: str) -> None:
    model = decoder(patterns()[name])
    check_rows(decoder_subject(name, model, rows=3, tokens=20), BOUND[torch.float64])
    check_packing(decoder_subject(name, model, rows=3, tokens=20), (3, 20, 1), BOUND[torch.float64])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", patterns())
def test_padding_changes_nothing(name: str, side: str) -> None:
    rows = [random_tokens(1, length, seed=length)[0] for length in (20, 7, 1, 13)]
    model = decoder(patterns()[name])
    check_padding(model, rows, side, BOUND[torch.float64])
