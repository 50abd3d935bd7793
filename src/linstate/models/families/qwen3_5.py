"""Qwen3.5, the part that reads text: Gated DeltaNet and gated attention, feed-forwards dense or mixtures of experts.

From :mod:`linstate.models.families.qwen3_next` it differs in the layout of the projections. Checkpoints of the models that
see pictures too hold the same under ``text_config`` and ``model.language_model``; their eyes (``visual``) are not read, nor
what they hold for predicting several tokens at once (``mtp``). Of text, all axes of the position are the same, so that
rotary embeddings in sections (``mrope``) are the usual ones.

Source: transformers ``models/qwen3_5`` and ``models/qwen3_5_moe``.
"""

from __future__ import annotations

from collections.abc import Mapping

from linstate.models.config import ModelConfig
from linstate.models.families import _parts as parts
from linstate.models.families import _qwen as qwen
from linstate.models.families._rules import Concat, Rule, Table, rule
from linstate.models.families._settings import Settings
from linstate.models.families.base import Family, Header

MIXTURES = ("qwen3_5_moe", "qwen3_5_moe_text")


class Qwen35(Family):
    """See the module."""

    model_types = ("qwen3_5", "qwen3_5_text", *MIXTURES)
    mixers = ("gated_deltanet", "attention")
    checked = "dense and experts, grouped heads, partial rotary, biases, tied head, the text part of the models with eyes"
    ignored = {**qwen.IGNORED, r"model\.visual\.": "for pictures"}  # noqa: RUF012

    def config(self, settings: Settings) -> ModelConfig:
        text, tie = settings, None
        if settings.has("text_config"):
            text = settings.part("text_config")
            settings.ignore("vision_config", "image_token_id", "video_token_id")
            settings.ignore("vision_start_token_id", "vision_end_token_id")
            if settings.has("tie_word_embeddings"):  # the whole model's counts
                tie = settings.flag("tie_word_embeddings")
                text.ignore("tie_word_embeddings")
        text.only("attn_output_gate", True, default=True)
        text.only("output_gate_type", "swish", "silu", default="swish")
        text.only("mlp_only_layers", [], default=[])
        text.ignore("mamba_ssm_dtype")  # the state is float32 in any case
        text.ignore("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings")
        layers = text.integer("num_hidden_layers")
        if settings.take("model_type") in MIXTURES:
            mixture = qwen.mixture(text, count=text.integer("num_experts", 256), top_k=8)
            return qwen.config(text, ("experts",) * layers, d_ff=None, tie=tie, experts=mixture)
        return qwen.config(text, ("swiglu",) * layers, d_ff=text.integer("intermediate_size"), tie=tie)

    def weights(self, config: ModelConfig, settings: Settings, found: Mapping[str, Header]) -> Table:
        inside = settings.has("text_config") or any(n.startswith("model.language_model.") for n in found)
        prefix = "model.language_model." if inside else "model."
        head = parts.ends(config.tie_embeddings, f"{prefix}embed_tokens", f"{prefix}norm")
        return [*head, *qwen.layers(config, found, prefix, projections(config))]


def projections(config: ModelConfig) -> list[Rule]:
    """Those of a linear layer, in four tensors."""
    hk, hv, k, v = qwen.heads(config)
    names = [f"in_proj_{part}.weight" for part in ("qkv", "z", "b", "a")]
    return [rule(names, "in_proj.weight", Concat(2 * hk * k + hv * v, hv * v, hv, hv))]
