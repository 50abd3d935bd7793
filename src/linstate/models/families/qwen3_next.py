"""Qwen3-Next: three layers of Gated DeltaNet to one of gated attention, mixtures of experts; norms about one.

Source: transformers ``models/qwen3_next``; Qwen3-Next-80B-A3B. What the checkpoints hold for predicting several tokens
at once (``mtp``) is not read.
"""

from __future__ import annotations

from collections.abc import Mapping

from linstate.models.config import ModelConfig
from linstate.models.families import _parts as parts
from linstate.models.families import _qwen as qwen
from linstate.models.families._rules import Concat, Each, Rule, Table, interleaved, rule
from linstate.models.families._settings import Settings
from linstate.models.families.base import Family, Header


class Qwen3Next(Family):
    """See the module."""

    model_types = ("qwen3_next",)
    mixers = ("gated_deltanet", "attention")
    checked = "grouped heads, dense layers among experts, norm_topk_prob, partial rotary, biases, tied head"
    ignored = qwen.IGNORED

    def config(self, settings: Settings) -> ModelConfig:
        layers = settings.integer("num_hidden_layers")
        dense = settings.take("mlp_only_layers", [])
        step, experts = settings.integer("decoder_sparse_step", 1), settings.integer("num_experts", 512)
        feed_forward = tuple(
            "experts" if experts > 0 and i not in dense and (i + 1) % step == 0 else "swiglu"
            for i in range(layers)
        )
        mixture = {
            **qwen.mixture(settings, count=experts, top_k=10),
            "renormalise": settings.flag("norm_topk_prob", True),
        }
        return qwen.config(
            settings, feed_forward, d_ff=settings.integer("intermediate_size", 5632), experts=mixture
        )

    def weights(self, config: ModelConfig, settings: Settings, found: Mapping[str, Header]) -> Table:
        head = parts.ends(config.tie_embeddings)
        return [*head, *qwen.layers(config, found, "model.", projections(config))]


def projections(config: ModelConfig) -> list[Rule]:
    """Those of a linear layer, which hold for each key head its q, k, v and z, and its beta and a."""
    hk, hv, k, v = qwen.heads(config)
    per = hv // hk
    of_head = interleaved([k, k, per * v, per * v], hk), interleaved([per, per], hk)
    rows = Concat(2 * hk * k + 2 * hv * v, 2 * hv)
    return [rule(("in_proj_qkvz.weight", "in_proj_ba.weight"), "in_proj.weight", Each(*of_head), rows)]
