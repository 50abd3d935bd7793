"""Law 6: changing token t changes nothing before t."""

from __future__ import annotations

import pytest

from laws.laws import check_causality
from laws.mixer_cases import decoder, decoder_subject, mixer_params, patterns, subject_of
from laws.op_cases import Sizes, accepted, kernel, kernels


@pytest.mark.parametrize("name", [n for n in kernels() if n[1] != "step"], ids="-".join)
def test_ops(name: tuple[str, str, str]) -> None:
    places = (0, 1, 31, 32, 63, 64, 71) if name[1] == "chunked" else (0, 5, 11)
    for case in accepted(name, Sizes(T=72 if name[1] == "chunked" else 12)):
        check_causality(case.subject(kernel(*name)), places)


@pytest.mark.parametrize(("name", "variant"), mixer_params())
def test_mixers(name: str, variant: str) -> None:
    check_causality(subject_of(name, variant, rows=2, tokens=72), (0, 1, 31, 63, 64, 71))


@pytest.mark.parametrize("name", patterns())
def test_models(name: str) -> None:
    check_causality(decoder_subject(name, decoder(patterns()[name]), rows=2, tokens=72), (0, 31, 64, 71))
