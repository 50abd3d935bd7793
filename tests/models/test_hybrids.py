"""The patterns of docs/hybrids.md are what the page says, and models of them read in pieces as at once."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from laws.laws import BOUND, close, same_state
from laws.mixer_cases import randomise
from linstate import mixers
from linstate.models import Decoder, ModelConfig

PAGE = Path(__file__).parent.parent.parent / "docs" / "hybrids.md"


def snippets() -> dict[str, str]:
    """The page's blocks of Python by the name that they assign."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    return {block.split(" = ")[0]: block for block in blocks}


def config_of(name: str) -> ModelConfig:
    defined: dict[str, ModelConfig] = {}
    exec(compile(snippets()[name], str(PAGE), "exec"), {"ModelConfig": ModelConfig}, defined)
    return defined[name]


def test_every_pattern_is_there() -> None:
    assert list(snippets()) == [
        "kimi_linear", "qwen3_next", "falcon_h1", "jamba", "nemotron_h", "zamba2", "samba", "griffin",
        "based", "looped",
    ]  # fmt: skip
    kimi = config_of("kimi_linear").layers
    assert [i + 1 for i, name in enumerate(kimi) if name == "mla"] == [4, 8, 12, 16, 20, 24, 27]
    assert config_of("kimi_linear").feed_forwards == ("swiglu",) + ("experts",) * 26
    assert config_of("qwen3_next").layers.count("attention") == 2
    looped = config_of("looped")
    assert looped.applied == tuple(name for name in looped.layers for _ in range(2))


@pytest.mark.parametrize("name", snippets())
def test_reading_in_pieces_is_reading_at_once(name: str) -> None:
    torch.manual_seed(0)
    config = config_of(name)
    if len(config.layers) > 8:  # the end of the pattern shows all of it
        config = replace(config, pattern=config.layers[-7:], num_layers=7)
    model = randomise(Decoder(config)).double().eval().requires_grad_(False)
    assert isinstance(model, Decoder)
    tokens = torch.randint(256, (2, 90), generator=torch.Generator().manual_seed(1))
    whole, after = model(tokens)
    parts, state = [], None
    for piece in tokens.split([40, 1, 1, 48], dim=1):
        logits, state = model(piece, state)
        parts.append(logits)
    # some seven layers deep in mixtures and norms
    close(torch.cat(parts, 1), whole, 10 * BOUND[torch.float64], f"{name}: logits")
    same_state(state, after, 10 * BOUND[torch.float64], name)
    grows = any(part in ("attention", "mla") for layer in config.applied for part in mixers.split(layer))
    assert (model.state_bytes(2000) > model.state_bytes(1000)) == grows
