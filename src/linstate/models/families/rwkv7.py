"""RWKV-7 as flash-linear-attention keeps it; the authors' own files are read by :mod:`linstate.models.rwkv_pth`.

Source: fla ``models/rwkv7``; fla-hub/rwkv7-0.4B-world, RWKV/RWKV7-Goose-World3-1.5B-HF.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from linstate.mixers.base import divide
from linstate.models.config import ModelConfig
from linstate.models.families import _fla
from linstate.models.families import _parts as parts
from linstate.models.families._rules import Reshape, Rule, Stack, rule
from linstate.models.families._settings import Settings


class RWKV7(_fla.FLAFamily):
    """See the module."""

    model_types = ("rwkv7",)
    mixers = ("rwkv7",)
    checked = "number or width of heads, ranks, with and without a norm behind the embedding, tied head"
    ff, act, share, multiple, norm_bias = "ffn", "sqrelu", 1.0, 32, True

    def config(self, settings: Settings) -> ModelConfig:
        width, layers = settings.integer("hidden_size", 2048), settings.integer("num_hidden_layers", 24)
        settings.only("norm_bias", True, default=True)
        settings.only("value_dim", width, [width] * layers, default=width)
        if settings.has("head_dim"):
            dim = settings.integer("head_dim")
            heads = divide(width, dim, "hidden_size into heads of head_dim")
            settings.ignore("num_heads")
        else:
            heads = settings.integer("num_heads", width // 64)
            dim = divide(width, heads, "hidden_size into num_heads")
        options = {
            "num_heads": heads,
            "head_dim": dim,
            "decay_rank": settings.integer("decay_low_rank_dim", 64),
            "rate_rank": settings.integer("a_low_rank_dim", 64),
            "value_rank": settings.integer("v_low_rank_dim", 16),
            "gate_rank": settings.integer("gate_low_rank_dim", 128),
            "norm_eps": dim * settings.number("norm_eps", 1e-5),
        }
        first = settings.flag("norm_first", True)
        return self.model(settings, options, norm="layernorm", embedding_norm=first)

    def mixer_rules(
        self, options: Mapping[str, Any], config: ModelConfig, settings: Settings, layer: int
    ) -> list[Rule]:
        return time_mix(config.d_model, layer)

    def ff_rules(self, config: ModelConfig) -> list[Rule]:
        return channel_mix()


def time_mix(width: int, layer: int) -> list[Rule]:
    """The time mix of a layer."""
    kept = ("r_proj.weight", "k_proj.weight", "v_proj.weight", "k_k", "k_a", "r_k")
    loras = [("decay", "w", True), ("rate", "a", True), ("gate", "g", False)]
    if layer > 0:
        loras.append(("value", "v", True))
    return [
        rule([f"x_{i}" for i in "rwkvag"], "mix", Stack(), Reshape((6, 1, 1, width), (6, width))),
        *(rule(name, name) for name in kept),
        *(made for ours, theirs, bias in loras for made in lora(f"{theirs}_lora", f"{ours}_lora", bias)),
        *parts.normed("g_norm", "norm", bias=True),
        rule("o_proj.weight", "out_proj.weight"),
    ]


def channel_mix() -> list[Rule]:
    """The channel mix of a layer."""
    return [rule("x_k", "mix"), rule("key.weight", "up.weight"), rule("value.weight", "down.weight")]


def lora(theirs: str, ours: str, bias: bool) -> list[Rule]:
    """A low-rank projection."""
    return [
        rule(f"{theirs}.lora.0.weight", f"{ours}.narrow.weight"),
        *parts.normed(f"{theirs}.lora.2", f"{ours}.widen", bias=bias),
    ]
