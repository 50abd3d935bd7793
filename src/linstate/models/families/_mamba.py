"""What the families around Mamba and Mamba-2 share: how transformers names their settings and tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from linstate.errors import ConfigError
from linstate.models.families import _parts as parts
from linstate.models.families._rules import Rule, rule
from linstate.models.families._settings import Settings

LAYERS = {
    "linear_attention": "mamba2",
    "mamba": "mamba2",
    "full_attention": "attention",
    "attention": "attention",
}
"""Names of layers, in use now and before version 5 of transformers."""


def held(settings: Settings, name: str, value: Any) -> None:
    """A setting that others determine: it need not be there. Raises ConfigError if it says another thing."""
    settings.only(name, value, default=value)


def initial(settings: Settings, *names: str) -> None:
    """Settings of the initial values, and of which implementation runs: of no effect on a model that reads."""
    settings.ignore("time_step_min", "time_step_max", "time_step_floor", "rescale_prenorm_residual", *names)


def limits(settings: Settings, name: str = "time_step_limit") -> tuple[float, float | None] | None:
    """The bounds of dt; None for none. Infinity is written as ``Infinity`` or ``{"__float__": "Infinity"}``. Raises ConfigError."""
    value = settings.take(name, [0.0, math.inf])
    bounds = [
        float(v["__float__"]) if isinstance(v, Mapping) and isinstance(v.get("__float__"), str) else v
        for v in (value if isinstance(value, list | tuple) else [])
    ]
    if len(bounds) != 2 or not all(isinstance(v, int | float) for v in bounds):
        raise ConfigError(f"{settings.where}: {name} must be two numbers, found {value!r}")
    low, high = bounds
    if low <= 0 and high == math.inf:
        return None
    return float(low), None if high == math.inf else float(high)


def scan(settings: Settings, expand: str = "expand", rank: str = "time_step_rank") -> dict[str, Any]:
    """Width and rank of a Mamba layer, as options. Raises ConfigError for a width that is no multiple of the model's."""
    width, low = settings.integer("hidden_size"), settings.take(rank, "auto")
    return {
        "expand": settings.integer(expand, 2),
        "dt_rank": -(-width // 16) if low == "auto" else settings.integer(rank),
    }


def mamba_mixer(settings: Settings) -> dict[str, Any]:
    """Options of the layers of Mamba and Falcon-Mamba."""
    settings.only("hidden_act", "silu", default="silu")
    settings.only("use_bias", False, default=False)
    settings.only("use_conv_bias", True, default=True)
    settings.only("rms_norm", True, default=True)
    initial(settings, "time_step_init_scheme", "time_step_scale", "use_mambapy", "use_falcon_mambapy")
    settings.ignore("use_associative_scan", "fused_add_norm", "pad_vocab_size_multiple")
    options = scan(settings)
    if settings.has("intermediate_size"):  # where it is given, theirs does not look at expand
        settings.ignore("expand")
        inner, width = settings.integer("intermediate_size"), settings.integer("hidden_size")
        if inner % width:
            raise ConfigError(
                f"{settings.where}: intermediate_size must be a multiple of hidden_size {width}, found {inner}"
            )
        options["expand"] = inner // width
    return {
        **options,
        "state_size": settings.integer("state_size", 16),
        "conv_width": settings.integer("conv_kernel", 4),
    }


def mamba_rules(*, norms: bool = False) -> list[Rule]:
    """A Mamba layer; ``norms``: with weights in the norms of dt, B and C."""
    kept = ["in_proj.weight", "x_proj.weight", "dt_proj.weight", "A_log", "D", "out_proj.weight"]
    named = [("dt_layernorm", "dt_norm"), ("b_layernorm", "B_norm"), ("c_layernorm", "C_norm")]
    return [
        *(rule(name, name) for name in kept),
        rule("dt_proj.bias", "dt_bias"),
        *parts.convolution("conv1d", bias=True),
        *(rule(f"{theirs}.weight", f"{ours}.weight") for theirs, ours in named if norms),
    ]


class Names(NamedTuple):
    """How a family names the settings of its Mamba-2 layers."""

    heads: str = "mamba_n_heads"
    dim: str = "mamba_d_head"
    state: str = "mamba_d_state"
    groups: str = "mamba_n_groups"
    conv: str = "mamba_d_conv"
    chunk: str = "mamba_chunk_size"
    conv_bias: str = "mamba_conv_bias"
    bias: str = "mamba_proj_bias"


OF_BAMBA = Names()


def mamba2_mixer(
    settings: Settings, eps: float, inner: int | None = None, names: Names = OF_BAMBA
) -> dict[str, Any]:
    """Options of a Mamba-2 layer of ``inner`` channels, where they are known, its norm with ``eps``. Raises ConfigError."""
    settings.only(names.conv_bias, True, default=True)
    settings.only(names.bias, False, default=False)
    settings.ignore(names.chunk, "use_mamba_kernels")
    heads = settings.integer(names.heads)
    auto = inner is not None and settings.take(names.dim, "auto") == "auto"
    dim = (inner or 0) // heads if auto else settings.integer(names.dim)
    if inner is not None and heads * dim != inner:
        raise ConfigError(
            f"{settings.where}: {names.heads} * {names.dim} must be the {inner} channels of a Mamba layer,"
            f" found {heads} * {dim}"
        )
    return {
        "num_heads": heads,
        "head_dim": dim,
        "state_size": settings.integer(names.state),
        "num_groups": settings.integer(names.groups, 1),
        "conv_width": settings.integer(names.conv, 4),
        "norm_eps": eps,
    }


def mamba2_rules(*, norm: bool = True) -> list[Rule]:
    """A Mamba-2 layer."""
    kept = ["in_proj.weight", "A_log", "D", "dt_bias", "out_proj.weight"]
    return [
        *(rule(name, name) for name in kept),
        *parts.convolution("conv1d", bias=True),
        *([rule("norm.weight", "norm.weight")] if norm else []),
    ]


def expanded(settings: Settings, name: str = "mamba_expand") -> int:
    """Channels of a Mamba layer."""
    return settings.integer(name, 2) * settings.integer("hidden_size")


def attention(settings: Settings) -> dict[str, Any]:
    """Options of Llama's attention, but for its rotary embedding."""
    heads = settings.integer("num_attention_heads")
    return {
        "num_heads": heads,
        "num_kv_heads": settings.integer("num_key_value_heads", heads),
        "head_dim": settings.integer("head_dim", settings.integer("hidden_size") // heads),
        "rotary_base": None,
        "bias": settings.flag("attention_bias", False),
    }


def rotated(settings: Settings, options: dict[str, Any], part: float = 1.0) -> dict[str, Any]:
    """The same attention with a rotary embedding of that part of the channels."""
    rope = settings.rope(part=part)
    return {**options, "rotary_base": rope.base, "rotary_dim": int(options["head_dim"] * rope.part)}
