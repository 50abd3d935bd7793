"""Every mixer and small models over them, built by name alone, as subjects of the laws."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from laws.laws import Subject
from linstate import mixers
from linstate.mixers import Mixer
from linstate.models import Decoder, ModelConfig
from linstate.ops import dispatch

D_MODEL = 64
VOCABULARY = 50

# Options that many mixers have. A mixer is tried with its defaults, and with these where it has them: several
# heads, grouped heads, a window that is full.
SEVERAL = {"num_heads": 2, "head_dim": 16, "window": 9}
GROUPED = {"num_heads": 4, "num_kv_heads": 2, "num_groups": 2}
GROUPED_VALUES = {"num_heads": 2, "num_v_heads": 4}


def variants(name: str) -> dict[str, dict[str, Any]]:
    """Options to try a mixer with, by a name for them."""
    has = mixers.find(name).options()
    found = {"defaults": {}, "several heads": {key: x for key, x in SEVERAL.items() if key in has}}
    for extra in (GROUPED, GROUPED_VALUES):
        own = {key: x for key, x in extra.items() if key in has}
        if set(own) - {"num_heads"}:
            found["grouped heads"] = {**found["several heads"], **own}
    if "ahead" in has:
        found["ahead"] = {**found["several heads"], "ahead": True}
    return {variant: options for variant, options in found.items() if options or variant == "defaults"}


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights with which every part counts: projections keep the size of what they project, nothing stays at zero."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in dict.fromkeys(module.parameters()):
        noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64).to(parameter.dtype)
        if parameter.dim() > 1:
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)
        else:
            parameter.add_(0.1 * noise)
    return module


def build(name: str, options: dict[str, Any], dtype: torch.dtype = torch.float64) -> Mixer:
    torch.manual_seed(0)
    mixer = mixers.find(name).build(name, D_MODEL, options)
    return randomise(mixer).to(dtype).eval().requires_grad_(False)  # type: ignore[return-value]


def mixer_subject(name: str, mixer: Mixer, rows: int, tokens: int, *, before: int = 11) -> Subject:
    """A mixer over random inputs, from the state after ``before`` others."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(rows, before + tokens, mixer.d_model, generator=draw, dtype=torch.float64).to(
        next(mixer.parameters()).dtype
    )

    def read(inputs: dict[str, Tensor], state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        return mixer(inputs["x"], state, cu_seqlens=cu_seqlens)

    with torch.no_grad():
        initial = mixer(x[:, :before])[1] if before else None
    return Subject(name, read, {"x": x[:, before:]}, initial)


SEVERAL_SSM = {"num_heads": 4, "head_dim": 16, "num_groups": 2}
EXPERTS = {"d_ff": 24, "num_experts": 6, "top_k": 2}
MODELS: dict[str, dict[str, Any]] = {
    "experts (sigmoid)": {
        "pattern": ("gated_deltanet", "sliding_window"),
        "feed_forward": ("swiglu", "experts"),
        "options": {"experts": {**EXPERTS, "groups": 3, "top_groups": 2}},
    },
    "experts (softmax)": {
        "pattern": ("gated_deltanet", "attention"),
        "feed_forward": "experts",
        "options": {"experts": {**EXPERTS, "router": "softmax", "shared_gate": True}},
    },
    "parallel": {
        "pattern": ("gated_deltanet+sliding_window", "retnet+rwkv7", "rwkv7+mamba2"),
        "options": {"gated_deltanet+sliding_window": {"sliding_window": SEVERAL, "scales": (0.5, 2.0)}},
    },
    "repeats": {"pattern": ("gated_deltanet", "sliding_window", "rwkv7"), "repeats": 3},
    "one thing in a layer": {
        "pattern": ("mamba", "none", "attention", "none", "mamba2"),
        "feed_forward": ("none", "mlp", "none", "experts", "none"),
        "options": {
            "mamba": {"norm": "rmsnorm"},
            "mamba2": {**SEVERAL_SSM, "norm_before_gate": True, "multipliers": (0.7, 1.4, 0.6, 1.3, 0.8)},
            "experts": {**EXPERTS, "gated": False, "activation": "relu2", "latent": 16},
        },
        "embedding_scale": 1.7,
        "logit_scale": 0.6,
    },
    "shared blocks": {
        "pattern": ("mamba2", "gated_deltanet", "mamba2"),
        "feed_forward": "none",
        "shared_blocks": {
            "layers": (0, 1, 2),
            "blocks": 2,
            "rank": 4,
            "adapt_attention": True,
            "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 32},
        },
    },
}
"""Models of which more is said than their mixers: fields of their configuration."""


def patterns() -> dict[str, tuple[str, ...] | dict[str, Any]]:
    """Models to try: two layers of each mixer, a hybrid of all of them, and :data:`MODELS`."""
    names = mixers.names()
    return {**{name: (name, name) for name in names}, "hybrid": names + names[:2], **MODELS}


def decoder(
    of: tuple[str, ...] | dict[str, Any], dtype: torch.dtype = torch.float64, **fields: Any
) -> Decoder:
    """A decoder of a pattern, or of fields, with random weights and several heads where the mixers have that option."""
    torch.manual_seed(0)
    fields = {**(of if isinstance(of, dict) else {"pattern": of}), **fields}
    several = {name: variants(name).get("several heads", {}) for name in set(fields["pattern"]) - {"none"}}
    fields["options"] = {**several, **fields.get("options", {})}
    config = ModelConfig(VOCABULARY, D_MODEL, **fields)
    return randomise(Decoder(config)).to(dtype).eval().requires_grad_(False)  # type: ignore[return-value]


def random_tokens(rows: int, tokens: int, seed: int = 2) -> Tensor:
    """Token ids; none is 0, so that one less is another token, too."""
    return torch.randint(1, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def decoder_subject(name: str, model: Decoder, rows: int, tokens: int, *, before: int = 11) -> Subject:
    """A model over random tokens, from the state after ``before`` others."""
    ids = random_tokens(rows, before + tokens)

    def read(inputs: dict[str, Tensor], state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        return model(inputs["tokens"], state, cu_seqlens=cu_seqlens)

    initial = model(ids[:, :before])[1] if before else None
    return Subject(f"model of {name}", read, {"tokens": ids[:, before:]}, initial)


@contextlib.contextmanager
def by_definition() -> Iterator[None]:
    """Every op inside runs its definition, whatever form and backend it would have chosen."""
    choose = dispatch.choose
    dispatch.choose = lambda recurrence, form, backend, call: dispatch.TABLE[recurrence, "recurrent", "torch"]  # type: ignore[assignment]
    try:
        yield
    finally:
        dispatch.choose = choose


def mixer_params() -> list[tuple[str, str]]:
    """(mixer, variant) for every mixer that discovery finds."""
    return [(name, variant) for name in mixers.names() for variant in variants(name)]


def subject_of(name: str, variant: str, rows: int, tokens: int, **how: Any) -> Subject:
    mixer = build(name, variants(name)[variant], how.pop("dtype", torch.float64))
    return mixer_subject(f"{name} ({variant})", mixer, rows, tokens, **how)
