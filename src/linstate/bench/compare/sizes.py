"""Models of the same size: same width, same depth, and a feed-forward that takes what the mixer leaves of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from linstate import mixers
from linstate.errors import ArgumentError
from linstate.models import Decoder, ModelConfig
from linstate.models.feed_forward import SwiGLU

BASE = "attention"
"""The mixer whose model the others are made as large as; it is a row of every table."""

NARROW = 256
"""Below this width mixers get smaller heads and ranks."""

_WIDE = {"head_dim": 64, "window": 256}
_NARROW = {"head_dim": 32, "window": 16, "segment": 16, "state_size": 16, "kv_rank": 32} | {
    "mix_rank": 8,
    **dict.fromkeys(("gate_rank", "decay_rank", "rate_rank", "value_rank"), 16),
}
_NARROW_OF = {"mamba2": {"state_size": 32}}


def options(name: str, d_model: int) -> dict[str, Any]:
    """Options of a mixer at a width: heads of the same size for all, in a narrow model small ranks; else its defaults."""
    wanted = {**_NARROW, **_NARROW_OF.get(name, {})} if d_model < NARROW else _WIDE
    return {key: value for key, value in wanted.items() if key in mixers.find(name).options()}


def config(
    name: str, vocab_size: int, d_model: int, layers: int, extra: Mapping[str, Any] | None = None
) -> ModelConfig:
    """A model of ``layers`` blocks of a mixer, with as many weights as the same model of softmax attention (to 1%).

    Every feed-forward is a SwiGLU, also where the mixer's paper has another: it is the mixers that are compared.

    Raises:
        ArgumentError: the mixer alone has more weights than a whole block of softmax attention.
    """
    chosen = {**options(name, d_model), **(extra or {})}
    mine = _model(name, vocab_size, d_model, layers, chosen, 1)
    room = _base_weights(d_model, layers) - _weights(mine)
    d_ff = 1 + round(room / (3 * d_model * layers))
    if d_ff < 1:
        raise ArgumentError(f"{name} at width {d_model} has more weights than a whole block of {BASE}")
    return replace(mine, d_ff=d_ff)


def weights_of(model: Decoder) -> int:
    """Weights of a model without its embedding."""
    return model.parameter_count() - model.embedding.weight.numel()


def _model(
    name: str, vocab_size: int, d_model: int, layers: int, chosen: dict[str, Any], d_ff: int
) -> ModelConfig:
    return ModelConfig(
        vocab_size,
        d_model,
        (name,),
        num_layers=layers,
        options={name: chosen},
        feed_forward="swiglu",
        d_ff=d_ff,
    )


@cache
def _base_weights(d_model: int, layers: int) -> int:
    return _weights(_model(BASE, 1, d_model, layers, options(BASE, d_model), SwiGLU.default_width(d_model)))


def _weights(of: ModelConfig) -> int:
    with torch.device("meta"):
        return weights_of(Decoder(of))
