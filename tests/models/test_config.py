"""ModelConfig: frozen, checked, and the same after a round trip through JSON."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from linstate import mixers
from linstate.errors import ConfigError
from linstate.models import Decoder, ModelConfig
from linstate.models.config import FORMAT, LATER

FULL = ModelConfig(
    vocab_size=50,
    d_model=32,
    pattern=("gated_deltanet", "gated_deltanet", "attention"),
    num_layers=7,
    options={
        "gated_deltanet": {"num_heads": 2, "head_dim": 16},
        "attention": {"num_heads": 2, "head_dim": 16},
    },
    feed_forward="swiglu",
    d_ff=48,
    tie_embeddings=False,
    norm="layernorm",
    norm_eps=1e-5,
    embedding_norm=True,
    repeats=2,
    in_place_ttt={"layers": [0, 6], "chunk": 8},
)


def small(**fields: Any) -> ModelConfig:
    return ModelConfig(**{"vocab_size": 50, "d_model": 32, "pattern": ("gated_deltanet",), **fields})


def test_round_trip() -> None:
    each = small(num_layers=3, feed_forward=("swiglu", "experts"))
    for config in (FULL, small(), small(pattern=mixers.names()), each):
        plain = json.loads(json.dumps(config.to_dict()))
        assert plain["format"] == FORMAT
        later = {name for name, value in LATER.items() if getattr(config, name) == value}
        assert set(plain) == {"format", *(f.name for f in dataclasses.fields(ModelConfig))} - later
        back = ModelConfig.from_dict(plain)
        assert back == config and back.to_dict() == plain


def test_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(FULL.to_dict()))
    assert ModelConfig.load(path) == FULL and ModelConfig.load(str(path)) == FULL
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*nowhere\.json"):
        ModelConfig.load(tmp_path / "nowhere.json")
    path.write_text('{"vocab_size": ')
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*config\.json"):
        ModelConfig.load(path)
    path.write_text("[1, 2]")
    with pytest.raises(ConfigError, match="must be a JSON object, found list"):
        ModelConfig.load(path)


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        FULL.d_model = 64  # type: ignore[misc]


def test_the_pattern_is_repeated_until_the_layers_are_filled() -> None:
    assert FULL.layers == ("gated_deltanet", "gated_deltanet", "attention") * 2 + ("gated_deltanet",)
    assert small().layers == ("gated_deltanet",) and small().num_layers == 1
    assert small(pattern=["retnet", "attention"], num_layers=1).layers == ("retnet",)
    assert small(pattern=["retnet"]).pattern == ("retnet",), "a list, as JSON has it, is a tuple here"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"pattern": "gated_deltanet"},
            "pattern must be a list of mixer names, got the string 'gated_deltanet'",
        ),
        ({"pattern": ()}, "pattern must name at least one mixer"),
        ({"pattern": ("gated_deltanet", "mamba17")}, "there is no mixer 'mamba17'; there are: "),
        ({"vocab_size": 0}, "vocab_size must be a positive integer, got 0"),
        ({"d_model": -3}, "d_model must be a positive integer, got -3"),
        ({"d_model": 32.0}, "d_model must be a positive integer, got 32.0"),
        ({"num_layers": -1}, "num_layers must be a positive integer, got -1"),
        ({"repeats": 0}, "repeats must be a positive integer, got 0"),
        (
            {"options": {"retnet": {}}},
            r"options are given for 'retnet', which is not in the pattern \['gated_deltanet'\]",
        ),
        ({"norm": "batchnorm"}, "norm must be one of rmsnorm, .*, layernorm, got 'batchnorm'"),
        ({"in_place_ttt": {"layers": [1]}}, r"in_place_ttt: layers must lie in \[0, 1\), got 1"),
        (
            {"feed_forward": "none", "in_place_ttt": {"layers": [0]}},
            "in_place_ttt: layer 0 has no feed-forward",
        ),
        ({"pattern": ("none",), "feed_forward": "none"}, "layer 0 has neither a mixer nor a feed-forward"),
        (
            {"pattern": ("none",), "shared_blocks": {"layers": [0]}},
            "shared_blocks: layers must be numbers of layers with a mixer, got 0",
        ),
        (
            {"shared_blocks": {"layers": [0]}, "repeats": 2},
            "shared_blocks cannot stand beside repeats, got repeats=2",
        ),
    ],
)
def test_what_does_not_fit_is_named(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        small(**fields)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"options": {"gated_deltanet": {"wheels": 4}}},
            "mixer 'gated_deltanet' has no option 'wheels'; it has: num_heads",
        ),
        (
            {"in_place_ttt": {"speed": 3}},
            "in_place_ttt has no option speed; it has: layers, chunk, lr, width",
        ),
        ({"in_place_ttt": {"width": 4}}, "chunk must be at least 1 and width odd, got chunk=512, width=4"),
        (
            {"shared_blocks": {"layers": [0], "wheels": 4}},
            "shared_blocks has no option wheels; it has: layers, blocks, rank",
        ),
        (
            {"shared_blocks": {"layers": [0], "blocks": 2}},
            "shared_blocks: blocks must be 1 to the 1 layers, got 2",
        ),
        (
            {"pattern": ("mamba",), "options": {"mamba": {"norm": "batchnorm"}}},
            "norm must be None, 'rmsnorm' or 'srmsnorm', got 'batchnorm'",
        ),
        (
            {"pattern": ("mamba2",), "options": {"mamba2": {"multipliers": (1, 2)}}},
            "multipliers must be 5 numbers, for z, x, B, C and dt, got",
        ),
        (
            {"feed_forward": "mlp", "options": {"mlp": {"activation": "tanh"}}},
            "activation must be one of silu, gelu, gelu_tanh, relu2, got 'tanh'",
        ),
        ({"feed_forward": "lawnmower"}, "there is no feed-forward 'lawnmower'; there are: swiglu"),
    ],
)
def test_what_only_a_model_can_tell(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Decoder(small(**fields))


def test_fields_that_are_unknown_or_missing() -> None:
    plain = FULL.to_dict()
    with pytest.raises(
        ConfigError, match=r"unknown fields in the configuration: colour, depth; known are: .*d_model"
    ):
        ModelConfig.from_dict({**plain, "depth": 3, "colour": "red"})
    with pytest.raises(ConfigError, match="fields missing in the configuration: d_model, pattern"):
        ModelConfig.from_dict({"vocab_size": 3})


def test_a_field_that_says_nothing_is_not_written() -> None:
    """A digest of the configuration names a model in its states: those of before the field must stay valid."""
    assert "repeats" not in small().to_dict() and small(repeats=2).to_dict()["repeats"] == 2
    assert ModelConfig.from_dict(small().to_dict()).repeats == 1


def test_another_format() -> None:
    with pytest.raises(
        ConfigError, match=f"has format {FORMAT + 1}, this Linstate reads format {FORMAT}; update Linstate"
    ):
        ModelConfig.from_dict({**FULL.to_dict(), "format": FORMAT + 1})
    assert ModelConfig.from_dict({k: v for k, v in FULL.to_dict().items() if k != "format"}) == FULL
