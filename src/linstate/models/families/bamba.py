"""Bamba: layers of Mamba-2, and of attention whose first half of channels turns, each with a SwiGLU.

Source: transformers ``models/bamba``; ibm-fms/Bamba-9B. Their code takes positions from zero again when it goes on
without being told them.
"""

from __future__ import annotations

from collections.abc import Collection

from linstate.models.config import ModelConfig
from linstate.models.families import _mamba
from linstate.models.families import _parts as parts
from linstate.models.families._rules import Table, rule, under
from linstate.models.families._settings import Settings
from linstate.models.families.base import Family


class Bamba(Family):
    """See the module."""

    model_types = ("bamba",)
    mixers = ("mamba2", "attention")
    checked = (
        "partial rotary, grouped heads in both kinds of layers, limits of dt, attention biases, tied head"
    )

    def config(self, settings: Settings) -> ModelConfig:
        layers, eps = settings.integer("num_hidden_layers"), settings.number("rms_norm_eps", 1e-5)
        full = settings.take("attn_layer_indices", [])
        pattern = tuple("attention" if i in full else "mamba2" for i in range(layers))
        settings.only("hidden_act", "silu", default="silu")
        settings.only("mlp_bias", False, default=False)
        settings.only("partial_rotary_factor", None, 0.5)
        settings.ignore("z_loss_coefficient")
        attention = _mamba.rotated(settings, _mamba.attention(settings), part=0.5)
        _mamba.held(settings, "attn_rotary_emb", attention["rotary_dim"])
        mamba2 = _mamba.mamba2_mixer(settings, eps, _mamba.expanded(settings))
        return ModelConfig(
            settings.integer("vocab_size"),
            settings.integer("hidden_size"),
            pattern,
            options=parts.used(
                pattern, mamba2={**mamba2, "dt_limit": _mamba.limits(settings)}, attention=attention
            ),
            feed_forward="swiglu",
            d_ff=settings.integer("intermediate_size"),
            tie_embeddings=settings.flag("tie_word_embeddings", False),
            norm_eps=eps,
        )

    def weights(self, config: ModelConfig, settings: Settings, names: Collection[str]) -> Table:
        table = [*parts.ends(config.tie_embeddings, norm="model.final_layernorm")]
        for i, mixer in enumerate(config.layers):
            theirs, ours = f"model.layers.{i}.", f"layers.{i}."
            table.append(rule(f"{theirs}input_layernorm.weight", f"{ours}mixer_norm.weight"))
            table.append(rule(f"{theirs}pre_ff_layernorm.weight", f"{ours}ff_norm.weight"))
            if mixer == "attention":
                rules = parts.attention(config.options["attention"])
                table += under(f"{theirs}self_attn.", f"{ours}mixer.", rules)
            else:
                table += under(f"{theirs}mamba.", f"{ours}mixer.", _mamba.mamba2_rules())
            table += under(f"{theirs}feed_forward.", f"{ours}ff.", parts.swiglu(config.d_ff or 0))
        return table
