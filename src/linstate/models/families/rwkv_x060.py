"""RWKV-6 as its authors keep it, in a ``.pth`` (:mod:`linstate.models.pth`).

Source: github.com/BlinkDL/ChatRWKV, ``RWKV_v6_demo.py``; BlinkDL/rwkv-6-world.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from linstate.models.config import ModelConfig
from linstate.models.families import _parts as parts
from linstate.models.families._rules import Order, Reshape, Rule, Stack, Transpose, rule
from linstate.models.families._rwkv_pth import PthFamily, vector

ORDER = torch.tensor([3, 1, 2, 4, 0])
"""Their low-rank mixes are for w, k, v, r, g, ours for r, k, v, g, w."""


class RWKVx060(PthFamily):
    """See the module."""

    model_types = ("rwkv_x060",)
    mixers = ("rwkv6",)
    checked = "against a plain loop, and the same weights in FLA's format"
    ranks = ("mix_rank", "decay_rank")

    def time_mix(self, options: Mapping[str, Any], config: ModelConfig, layer: int) -> list[Rule]:
        d, r, inner = config.d_model, options["mix_rank"], options["num_heads"] * options["head_dim"]
        kept = {
            "receptance": "r_proj",
            "key": "k_proj",
            "value": "v_proj",
            "gate": "gate_proj",
            "output": "out_proj",
        }
        rows, flat = Reshape((5 * r, d), (5, r, d)), Reshape((5, r, d), (5 * r, d))
        return [
            rule([f"time_maa_{i}" for i in "rkvgwx"], "mix", Stack(), Reshape((6, 1, 1, d), (6, d))),
            rule("time_maa_w1", "mix_narrow.weight", Transpose(), rows, Order(ORDER), flat),
            rule("time_maa_w2", "mix_widen", Order(ORDER), Transpose()),
            vector("time_decay", "decay", inner),
            rule("time_decay_w1", "decay_lora.narrow.weight", Transpose()),
            rule("time_decay_w2", "decay_lora.widen.weight", Transpose()),
            rule("time_faaaa", "bonus"),
            *(rule(f"{theirs}.weight", f"{ours}.weight") for theirs, ours in kept.items()),
            *parts.normed("ln_x", "norm", bias=True),
        ]

    def channel_mix(self, config: ModelConfig) -> list[Rule]:
        d = config.d_model
        return [
            rule(("time_maa_k", "time_maa_r"), "mix", Stack(), Reshape((2, 1, 1, d), (2, d))),
            rule("key.weight", "up.weight"),
            rule("value.weight", "down.weight"),
            rule("receptance.weight", "receptance.weight"),
        ]
