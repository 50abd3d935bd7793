"""RWKV-6 as flash-linear-attention keeps it; the authors' own files are read by :mod:`linstate.models.rwkv_pth`.

Source: fla ``models/rwkv6``; fla-hub/rwkv6-7B-finch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from linstate.mixers.base import divide
from linstate.models.config import ModelConfig
from linstate.models.families import _fla
from linstate.models.families import _parts as parts
from linstate.models.families._rules import Concat, Each, Order, Reshape, Rule, Stack, Transpose, rule
from linstate.models.families._settings import Settings

ORDER = torch.tensor([0, 2, 3, 4, 1])
"""Theirs mixes for r, w, k, v, g, ours for r, k, v, g, w."""


class RWKV6(_fla.FLAFamily):
    """See the module."""

    model_types = ("rwkv6",)
    mixers = ("rwkv6",)
    checked = "ranks, with and without a norm behind the embedding, tied head"
    ff, act, ratio, share, multiple, norm_bias = "ffn", "sqrelu", 3.5, 1.0, 32, True

    def config(self, settings: Settings) -> ModelConfig:
        width, heads = settings.integer("hidden_size", 2048), settings.integer("num_heads", 4)
        settings.only("norm_bias", True, default=True)
        settings.only("expand_k", 1, default=0.5)
        settings.only("expand_v", 1, default=1.0)
        options = {
            "num_heads": heads,
            "head_dim": divide(width, heads, "hidden_size into num_heads"),
            "mix_rank": settings.integer("proj_low_rank_dim", 32),
            "decay_rank": settings.integer("gate_low_rank_dim", 64),
            "norm_eps": settings.number("norm_eps", 1e-5),
        }
        first = settings.flag("norm_first", True)
        return self.model(settings, options, norm="layernorm", embedding_norm=first)

    def mixer_rules(
        self, options: Mapping[str, Any], config: ModelConfig, settings: Settings, layer: int
    ) -> list[Rule]:
        return time_mix(config.d_model, options["mix_rank"])

    def ff_rules(self, config: ModelConfig) -> list[Rule]:
        return channel_mix()


def time_mix(d: int, r: int) -> list[Rule]:
    """The time mix of a layer of width ``d``, its mixes of rank ``r``."""
    rows = Reshape((5 * r, d), (5, r, d))
    return [
        rule(("x_bias", "x_proj.0.mu"), "mix", Each(Order(ORDER), Reshape((d,), (1, d))), Concat(5, 1)),
        rule(
            "x_proj.0.linear.weight",
            "mix_narrow.weight",
            rows,
            Order(ORDER),
            Reshape((5, r, d), (5 * r, d)),
        ),
        rule("x_proj.2.weight", "mix_widen", Transpose(), rows, Order(ORDER), Transpose()),
        rule("w_proj.linear.lora.0.weight", "decay_lora.narrow.weight"),
        rule("w_proj.linear.lora.2.weight", "decay_lora.widen.weight"),
        rule("w_proj.linear.lora.2.bias", "decay"),
        rule("bonus", "bonus"),
        *(rule(f"{name}_proj.linear.weight", f"{name}_proj.weight") for name in "rkv"),
        rule("g_proj.linear.weight", "gate_proj.weight"),
        *parts.normed("g_norm", "norm", bias=True),
        rule("o_proj.weight", "out_proj.weight"),
    ]


def channel_mix() -> list[Rule]:
    """The channel mix of a layer."""
    return [
        rule(("key.mu", "receptance.mu"), "mix", Stack()),
        rule("key.linear.weight", "up.weight"),
        rule("value.weight", "down.weight"),
        rule("receptance.linear.weight", "receptance.weight"),
    ]
