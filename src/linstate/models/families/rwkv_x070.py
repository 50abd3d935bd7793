"""RWKV-7 as its authors keep it, in a ``.pth`` (:mod:`linstate.models.pth`).

Source: github.com/BlinkDL/RWKV-LM, ``RWKV-v7/rwkv_v7_demo_rnn.py``; BlinkDL/rwkv-7-world.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from linstate.models.config import ModelConfig
from linstate.models.families import _parts as parts
from linstate.models.families._rules import Reshape, Rule, Stack, Transpose, rule
from linstate.models.families._rwkv_pth import PthFamily, vector


class RWKVx070(PthFamily):
    """See the module."""

    model_types = ("rwkv_x070",)
    mixers = ("rwkv7",)
    checked = "against a plain loop, and the same weights in FLA's format"
    ranks = ("decay_rank", "rate_rank", "value_rank", "gate_rank")
    ignored = {r"blocks\.0\.att\.v[012]$": "the first layer's values are its own"}  # noqa: RUF012

    def time_mix(self, options: Mapping[str, Any], config: ModelConfig, layer: int) -> list[Rule]:
        width, inner = config.d_model, options["num_heads"] * options["head_dim"]
        loras = [("decay", "w"), ("rate", "a"), *([("value", "v")] if layer else [])]
        kept = (("receptance", "r_proj"), ("key", "k_proj"), ("value", "v_proj"), ("output", "out_proj"))
        return [
            rule([f"x_{i}" for i in "rwkvag"], "mix", Stack(), Reshape((6, 1, 1, width), (6, width))),
            *(rule(f"{theirs}.weight", f"{ours}.weight") for theirs, ours in kept),
            *(made for ours, theirs in (*loras, ("gate", "g")) for made in lora(theirs, ours)),
            *(vector(f"{theirs}0", f"{ours}_lora.widen.bias", inner) for ours, theirs in loras),
            vector("k_k", "k_k", inner),
            vector("k_a", "k_a", inner),
            rule("r_k", "r_k"),
            *parts.normed("ln_x", "norm", bias=True),
        ]

    def channel_mix(self, config: ModelConfig) -> list[Rule]:
        return [
            vector("x_k", "mix", config.d_model),
            rule("key.weight", "up.weight"),
            rule("value.weight", "down.weight"),
        ]


def lora(theirs: str, ours: str) -> list[Rule]:
    """The two matrices of a low-rank projection, which they multiply from the right."""
    return [
        rule(f"{theirs}1", f"{ours}_lora.narrow.weight", Transpose()),
        rule(f"{theirs}2", f"{ours}_lora.widen.weight", Transpose()),
    ]
