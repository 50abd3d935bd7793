"""Small random language models of several patterns, for the tests of states and reading."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from linstate import Decoder, LanguageModel, ModelConfig
from linstate.bench.model_cases import CASES, Case

PATTERNS: dict[str, tuple[str, ...]] = {
    "delta": ("gated_deltanet", "gated_deltanet"),
    "sum": ("linear_transformer",),
    "rwkv": ("rwkv7", "rwkv7"),
    "hybrid": ("kimi_delta", "mamba2", "sliding_window", "attention"),
    "keyed": ("keyed_window", "deltanet+keyed_window"),
    "experts": ("gated_deltanet+sliding_window", "mla"),
}

FIELDS: dict[str, dict[str, Any]] = {"experts": {"feed_forward": ("swiglu", "experts"), "repeats": 2}}
"""What more there is to say of a pattern's model."""

TEXT = "\n".join(
    f"entry {i}: the {colour} {thing} has number {i * 7919 % 1000}; keep it."
    for i, (colour, thing) in enumerate(
        (c, t)
        for c in ("red", "green", "blue", "grey", "pink")
        for t in ("lamp", "chair", "book", "stone", "spoon", "door")
    )
)


@cache
def tokenizer() -> Tokenizer:
    """A byte-level BPE of 300 entries."""
    made = Tokenizer(BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([TEXT], trainer)
    made.encode_special_tokens = True
    return made


def build(pattern: str = "delta", *, seed: int = 0, grid: int = 16) -> LanguageModel:
    """A model of this pattern, its weights large enough that a lost state shows in the next token."""
    torch.manual_seed(seed)
    names = PATTERNS[pattern]
    config = ModelConfig(
        vocab_size=300,
        d_model=32,
        pattern=names,
        options={n: _small(n) for n in names},
        d_ff=48,
        **FIELDS.get(pattern, {}),
    )
    decoder = Decoder(config)
    with torch.no_grad():
        for weight in decoder.parameters():
            if weight.dim() == 2:
                weight.normal_(std=2.0 / weight.shape[1] ** 0.5)
    return LanguageModel(decoder, tokenizer(), name=pattern, end=None, grid=grid)


def _small(name: str) -> dict[str, Any]:
    if "+" in name:
        return {part: _small(part) for part in name.split("+")}
    if name == "sliding_window":
        return {"num_heads": 2, "head_dim": 16, "window": 12}
    if name == "keyed_window":
        return {"num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "window": 40}
    return {"head_dim": 16}


SMALL_CASES: dict[str, dict[str, Any]] = {
    "mamba2-370m": {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 2},
    "qwen3.5-0.8b": {
        "vocab_size": 512,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    },
    "rwkv7-0.4b": {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 256},
}


def small_case(name: str) -> Case:
    """A model of ``linstate bench model``, made small."""
    case = CASES[name]
    return replace(case, raw={**case.raw, **SMALL_CASES[name]})
