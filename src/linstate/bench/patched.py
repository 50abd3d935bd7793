"""What ``patch_transformers()`` does for whole models of transformers: how far their pieces are off, and how fast they are.

Random models of real widths and few layers. Theirs and ours have a turn in every round, in alternating order; times are medians.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from linstate.bench.peers import without_fla
from linstate.errors import ConfigError, InputError
from linstate.patch import patch_transformers

_ALL = {"vocab_size": 1024, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2}
_FOUR = ["linear_attention"] * 3 + ["full_attention"]

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_5": (
        "Qwen3_5TextConfig",
        {
            **_HEADS,
            "hidden_size": 1024,
            "intermediate_size": 3584,
            "num_hidden_layers": 4,
            "layer_types": _FOUR,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 16,
        },
    ),
    "kimi_linear": (
        "KimiLinearConfig",
        {
            "hidden_size": 1024,
            "intermediate_size": 2048,
            "moe_intermediate_size": 512,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 4,
            "layer_types": _FOUR,
            "linear_num_heads": 8,
        },
    ),
    "mamba": ("MambaConfig", {"hidden_size": 768, "num_hidden_layers": 4}),
    "jamba": (
        "JambaConfig",
        {
            **_HEADS,
            "hidden_size": 1024,
            "intermediate_size": 2048,
            "num_hidden_layers": 4,
            "attn_layer_period": 4,
            "attn_layer_offset": 3,
            "num_experts": 1,
        },
    ),
    "mamba2": (
        "Mamba2Config",
        {"hidden_size": 1024, "num_hidden_layers": 4, "num_heads": 32, "head_dim": 64, "n_groups": 1},
    ),
    "bamba": (
        "BambaConfig",
        {
            **_HEADS,
            "hidden_size": 1024,
            "intermediate_size": 2048,
            "num_hidden_layers": 4,
            "attn_layer_indices": [3],
            "mamba_n_heads": 32,
            "mamba_d_state": 128,
        },
    ),
    "minimax": (
        "MiniMaxConfig",
        {
            **_HEADS,
            "hidden_size": 1024,
            "intermediate_size": 1024,
            "num_hidden_layers": 4,
            "layer_types": _FOUR,
            "num_local_experts": 2,
            "head_dim": 128,
        },
    ),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 3, "num_attention_heads": 4},
    ),
    "rwkv": ("RwkvConfig", {"hidden_size": 768, "num_hidden_layers": 4}),
    "xlstm": ("xLSTMConfig", {"hidden_size": 1024, "num_hidden_layers": 4, "num_heads": 4}),
    "lfm2": (
        "Lfm2Config",
        {
            **_HEADS,
            "hidden_size": 1024,
            "intermediate_size": 2560,
            "num_hidden_layers": 4,
            "layer_types": ["conv"] * 3 + ["full_attention"],
        },
    ),
}
"""Family -> its configuration class and what is set in it."""

_CACHE = {"mamba": "cache_params", "mamba2": "cache_params", "xlstm": "cache_params", "rwkv": "state"}
STEPS = 16


@dataclass(frozen=True)
class Measured:
    """One family: milliseconds of theirs and ours, and how far reading in pieces is off, relative to the largest logit."""

    family: str
    weights: int
    prefill: tuple[float, float]
    step: tuple[float, float]
    pieces: tuple[float, float]
    same: float


def build(family: str, dtype: torch.dtype) -> Any:
    """A random model in eval mode; FLA is hidden while its file is loaded, since without a GPU theirs would not run at all."""
    name, values = MODELS[family]
    try:
        with without_fla():
            module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    except ImportError as error:
        raise ConfigError(
            f"transformers has no {family}, or is not installed ({error}): pip install 'linstate[hf]'"
        ) from error
    torch.manual_seed(0)
    config = getattr(module, name)(**{**_ALL, **values})
    prefix = name.removesuffix("Config").removesuffix("Text")
    model = getattr(module, f"{prefix}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter, p in model.named_parameters():  # of a size at which a state counts
            if "A_log" in parameter:
                p.uniform_(-4, 0)
            elif p.dim() > 1 and "time_mix" not in parameter and "norm" not in parameter:
                p.normal_(std=p.shape[-1] ** -0.5)
    return model.to(dtype)


def read(model: Any, ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
    """Logits and the cache behind them."""
    family = model.config.model_type.removesuffix("_text")
    name = _CACHE.get(family, "past_key_values")
    if family == "recurrent_gemma" and cache is None:  # which does not hand it out
        from transformers import DynamicCache

        cache = DynamicCache(config=model.config)
    output = model(ids, use_cache=True, **({} if cache is None else {name: cache}))
    return output.logits, cache if family == "recurrent_gemma" else getattr(output, name)


def measure(
    family: str,
    *,
    tokens: int = 512,
    dtype: torch.dtype = torch.float32,
    rounds: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> Measured:
    """Measure one family. Raises InputError for a name that is not in :data:`MODELS`."""
    if family not in MODELS:
        raise InputError(
            f"there is no model of the family {family!r} to measure; there are: {', '.join(MODELS)}"
        )
    model = build(family, dtype)
    ids = torch.randint(3, 1024, (1, tokens), generator=torch.Generator().manual_seed(0))
    times: dict[tuple[bool, str], list[float]] = {}
    logits: dict[tuple[bool, str], Tensor] = {}

    def turn(ours: bool) -> None:
        begin = clock()
        logits[ours, "whole"], cache = read(model, ids)
        middle = clock()
        for _ in range(STEPS):
            _, cache = read(model, ids[:, -1:], cache)
        times.setdefault((ours, "prefill"), []).append(1e3 * (middle - begin))
        times.setdefault((ours, "step"), []).append(1e3 * (clock() - middle) / STEPS)

    with torch.no_grad():
        for number in range(rounds + 1):  # the first loads and allocates, and does not count
            for ours in (False, True) if number % 2 else (True, False):
                if ours:
                    with patch_transformers(quiet=True):
                        turn(ours)
                else:
                    turn(ours)
        for ours in (False, True):
            patch = patch_transformers(quiet=True) if ours else None
            first, cache = read(model, ids[:, : tokens // 2])
            logits[ours, "pieces"] = torch.cat([first, read(model, ids[:, tokens // 2 :], cache)[0]], dim=1)
            if patch is not None:
                patch.unpatch()
    median = {key: statistics.median(found[1:]) for key, found in times.items()}
    whole = logits[False, "whole"]
    return Measured(
        family,
        sum(p.numel() for p in model.parameters()),
        (median[False, "prefill"], median[True, "prefill"]),
        (median[False, "step"], median[True, "step"]),
        (_off(logits[False, "pieces"], whole), _off(logits[True, "pieces"], logits[True, "whole"])),
        _off(logits[True, "whole"], whole),
    )


def _off(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())
