"""Nemotron-H: a layer is one thing, Mamba-2, attention without positions, a plain feed-forward, or a mixture of experts.

Their Mamba-2 keeps dt above ``time_step_min`` when it reads more than one token, and not when it reads one; ours always.

Source: transformers ``models/nemotron_h``; NVIDIA-Nemotron-3-Nano-30B-A3B. What the checkpoints hold for predicting several
tokens at once (``mtp``) is not read.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from linstate.errors import ConfigError
from linstate.models.config import NONE, ModelConfig
from linstate.models.families import _mamba
from linstate.models.families import _parts as parts
from linstate.models.families._rules import Rule, Stack, Table, rule, under
from linstate.models.families._settings import Settings
from linstate.models.families.base import Family

NAMES = _mamba.Names(
    "mamba_num_heads",
    "mamba_head_dim",
    "ssm_state_size",
    "n_groups",
    "conv_kernel",
    "chunk_size",
    "use_conv_bias",
)
LETTERS = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}
LAYERS = {**_mamba.LAYERS, "mlp": "mlp", "moe": "experts"}


class NemotronH(Family):
    """See the module."""

    model_types = ("nemotron_h",)
    mixers = ("mamba2", "attention")
    checked = (
        "all kinds of layers, latent experts, groups of experts, norm_topk_prob, grouped heads, bounds of dt"
    )
    ignored = {r"mtp\.": "prediction of several tokens at once"}  # noqa: RUF012

    def config(self, settings: Settings) -> ModelConfig:
        kinds = layer_kinds(settings)
        settings.only("tie_word_embeddings", False, default=False)
        settings.only("sliding_window", None)
        settings.only("mlp_bias", False, default=False)
        settings.only("use_bias", False, default=False)
        settings.only("mlp_hidden_act", "relu2", default="relu2")
        settings.only("mamba_hidden_act", "silu", default="silu")
        _mamba.initial(settings, "time_step_limit", "time_step_rank", "expand")
        settings.ignore("residual_in_fp32", "mamba_ssm_cache_dtype", "moe_shared_expert_overlap")
        settings.ignore("num_nextn_predict_layers", "mtp_layers_block_type", "mtp_hybrid_override_pattern")
        settings.ignore(
            "rope_theta", "partial_rotary_factor", "rms_norm_eps", "norm_eps"
        )  # theirs reads none
        pattern = tuple(kind if kind in self.mixers else NONE for kind in kinds)
        feed_forward = tuple(NONE if kind in self.mixers else kind for kind in kinds)
        return ModelConfig(
            settings.integer("vocab_size"),
            settings.integer("hidden_size"),
            pattern,
            options=parts.used(
                kinds,
                mamba2=mamba2(settings),
                attention=attention(settings),
                mlp={"activation": "relu2", "d_ff": settings.integer("intermediate_size", 21504)},
                experts=mixture(settings),
            ),
            feed_forward=feed_forward,
            tie_embeddings=False,
            norm_eps=settings.number("layer_norm_epsilon", 1e-5),
        )

    def weights(self, config: ModelConfig, settings: Settings, names: Collection[str]) -> Table:
        top = "model." if "model.embeddings.weight" in names else "backbone."
        table = [*parts.ends(False, f"{top}embeddings", f"{top}norm_f")]
        for i, (mixer, ff) in enumerate(zip(config.layers, config.feed_forwards, strict=True)):
            theirs, ours = f"{top}layers.{i}.", f"layers.{i}."
            norm = "ff_norm" if mixer == NONE else "mixer_norm"
            table.append(rule(f"{theirs}norm.weight", f"{ours}{norm}.weight"))
            theirs, ours = f"{theirs}mixer.", f"{ours}{'ff' if mixer == NONE else 'mixer'}."
            match ff if mixer == NONE else mixer:
                case "mamba2":
                    table += under(theirs, ours, _mamba.mamba2_rules())
                case "attention":
                    table += under(theirs, ours, parts.attention(config.options["attention"]))
                case "mlp":
                    table += under(theirs, ours, plain())
                case _:
                    table += under(theirs, ours, mixture_rules(config.options["experts"]))
        return table


def layer_kinds(settings: Settings) -> tuple[str, ...]:
    """What each layer is: from a list of names, or a letter for each. Raises ConfigError."""
    letters = settings.take("hybrid_override_pattern", "")
    unknown = sorted(set(letters) - set(LETTERS))
    if unknown:
        raise ConfigError(
            f"{settings.where}: hybrid_override_pattern has {', '.join(unknown)}, which Linstate does not do;"
            f" it does {', '.join(LETTERS)}"
        )
    name = "layer_types" if settings.has("layer_types") else "layers_block_type"
    given = settings.take(
        name, [LETTERS[letter] for letter in letters] or ["linear_attention", "moe", "full_attention", "mlp"]
    )
    kinds = settings.listed(name, LAYERS, given, len(given))
    _mamba.held(settings, "num_hidden_layers", len(kinds))
    return kinds


def mamba2(settings: Settings) -> dict[str, Any]:
    """Options of the Mamba-2 layers."""
    eps = settings.number("layer_norm_epsilon", 1e-5)
    options = _mamba.mamba2_mixer(settings, eps, names=NAMES)
    return {**options, "dt_limit": (settings.number("time_step_min", 0.001), None)}


def attention(settings: Settings) -> dict[str, Any]:
    """Options of the attention layers."""
    name = "attention_head_dim" if settings.has("attention_head_dim") else "head_dim"
    return {
        **_mamba.attention(settings),
        "head_dim": settings.integer(name, 128),
        "bias": settings.only("attention_bias", False, default=False),
    }


def mixture(settings: Settings) -> dict[str, Any]:
    """Options of the mixtures of experts."""
    settings.only("n_shared_experts", 1, default=1)
    return {
        "num_experts": settings.integer("n_routed_experts", 8),
        "d_ff": settings.integer("moe_intermediate_size", 7688),
        "shared_width": settings.integer("moe_shared_expert_intermediate_size", 7688),
        "top_k": settings.integer("num_experts_per_tok", 2),
        "groups": settings.integer("n_group", 1),
        "top_groups": settings.integer("topk_group", 1),
        "scale": settings.number("routed_scaling_factor", 1.0),
        "renormalise": settings.flag("norm_topk_prob", True),
        "latent": settings.take("moe_latent_size", None),
        "gated": False,
        "activation": "relu2",
    }


def plain() -> list[Rule]:
    """A feed-forward without a gate."""
    return [rule("up_proj.weight", "up.weight"), rule("down_proj.weight", "down.weight")]


def mixture_rules(options: Any) -> list[Rule]:
    """A mixture of experts without gates, and the expert that all tokens share."""
    experts = range(options["num_experts"])
    narrow = [("fc1_latent_proj", "narrow"), ("fc2_latent_proj", "widen")] if options["latent"] else []
    return [
        rule("gate.weight", "router.weight"),
        rule("gate.e_score_correction_bias", "bias"),
        rule([f"experts.{e}.up_proj.weight" for e in experts], "up", Stack()),
        rule([f"experts.{e}.down_proj.weight" for e in experts], "down", Stack()),
        *(rule(f"{theirs}.weight", f"{ours}.weight") for theirs, ours in narrow),
        *under("shared_experts.", "shared.", plain()),
    ]
