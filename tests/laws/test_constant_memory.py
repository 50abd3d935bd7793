"""Law 4: a recurrent state has as many bytes after 1,000,000 tokens as after 1,000, and keeps no others alive."""

from __future__ import annotations

import pytest
import torch

from laws.laws import check_constant_memory, exempt, held_bytes, own_bytes
from laws.mixer_cases import build, decoder, decoder_subject, mixer_params, mixer_subject, patterns, variants
from laws.op_cases import Sizes, accepted, kernel, kernels
from linstate import mixers


@pytest.mark.parametrize(("name", "variant"), mixer_params())
def test_mixers(name: str, variant: str) -> None:
    mixer = build(name, variants(name)[variant], torch.float32)
    subject = mixer_subject(name, mixer, rows=1, tokens=3_000, before=0)
    check_constant_memory(mixer.state_bytes, subject, grows=exempt(name, "constant_memory"))


@pytest.mark.parametrize("name", patterns())
def test_models(name: str) -> None:
    model = decoder(patterns()[name], torch.float32)
    grows = any(
        exempt(part, "constant_memory") for name in model.config.applied for part in mixers.split(name)
    )
    check_constant_memory(
        model.state_bytes, decoder_subject(name, model, rows=2, tokens=300, before=0), grows=grows
    )


@pytest.mark.parametrize("name", [n for n in kernels() if n[1] != "step"], ids="-".join)
def test_a_final_state_keeps_nothing_else_alive(name: tuple[str, str, str]) -> None:
    """One row too: a slice of a single row is contiguous, so that ``contiguous()`` does not copy it."""
    for case in accepted(name, Sizes(B=1, T=140)):
        _, state = case.run(kernel(*name))
        assert held_bytes(state) <= own_bytes(state), (
            f"{case}: {own_bytes(state)} bytes keep {held_bytes(state)} alive"
        )
