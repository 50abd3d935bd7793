"""What a family's tests declare: small checkpoints that the real library makes and saves, and what it computes with them.

A file ``test_<family>.py`` has ``CASES``; ``test_families.py`` finds them and holds every one to the same laws.
"""

from __future__ import annotations

import copy
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oracles import fla_models
from oracles.oracle import hf_module, randomise

VOCABULARY = 97
Oracle = Callable[[Tensor, torch.dtype], Tensor]
"""Token ids ``[B, T]`` and the dtype of the weights -> logits ``[B, T, vocabulary]``, the whole text at once."""

GATES = {"A_log": lambda u: 2 * u - 2, "dt_bias": lambda u: 2 * u - 4}
"""Decays that neither vanish nor forget at once."""
CENTRED = GATES | dict.fromkeys(
    ("layernorm.weight", "q_norm.weight", "k_norm.weight", "model.norm.weight"), lambda u: u - 0.5
)
"""The same with norms whose weights are distances from one."""

BRANCH_ENDS = (
    "out_proj",
    "o_proj",
    "down_proj",
    "dense_4h_to_h",
    "w2",
    "attention.output",
    "ffn.value",
    "feed_forward.value",
)


@dataclass(frozen=True)
class Case:
    """A checkpoint: ``save(folder)`` writes it and returns what its library makes of token ids.

    bf16: largest deviation allowed in bfloat16, relative to the largest logit.
    rounds: the weight table has scales, so that its inverse is right only to the last bits.
    """

    name: str
    save: Callable[[Path], Oracle]
    bf16: float = 2e-2
    rounds: bool = False


def hf(
    name: str,
    model_type: str,
    module: str | None = None,
    *,
    seed: int = 0,
    values: Mapping[str, Callable[[Tensor], Tensor]] = GATES,
    adjust: Callable[[nn.Module], None] | None = None,
    rounds: bool = False,
    branches: float = 0.25,
    embedding: float = 1.0,
    architecture: str | None = None,
    wide: bool = False,
    **settings: Any,
) -> Case:
    """A checkpoint of transformers.

    Args:
        module: the folder of its modeling file, where it has not the name of the model type.
        values: initial values by the ends of parameters' names, as in ``oracles.oracle.randomise``.
        adjust: what more there is to do to the weights.
        branches: size of what layers add to the residual stream. Not too large, or roundings in bfloat16 grow from layer
            to layer and an expert is chosen instead of another.
        embedding: size of the embedding. Not too large where it is the head too, or every token is its own likeliest follower.
        architecture: the class of the model, where it is not the one for text.
        wide: theirs does not run in bfloat16: it computes in float32 with weights rounded to bfloat16.
        settings: of its configuration.
    """

    def save(folder: Path) -> Oracle:
        with pytest.MonkeyPatch.context() as patch:
            modeling = hf_module(module or model_type, patch)
            from transformers import AutoConfig, AutoModelForCausalLM

            torch.manual_seed(seed)
            config = AutoConfig.for_model(model_type, **settings)
            config.get_text_config().vocab_size = VOCABULARY
            make = (
                AutoModelForCausalLM.from_config
                if architecture is None
                else getattr(modeling, architecture)._from_config
            )
            model = make(config, attn_implementation="eager", experts_implementation="eager").eval()
            randomise(model, **values)
            with torch.no_grad():
                for buffer_name, buffer in model.named_buffers():
                    if buffer_name.endswith("e_score_correction_bias"):
                        buffer.normal_(std=0.2)
                settle(model, embedding, branches)
                if adjust is not None:
                    adjust(model)
            model.save_pretrained(folder)

        def logits(tokens: Tensor, dtype: torch.dtype) -> Tensor:
            with pytest.MonkeyPatch.context() as patch, torch.no_grad():
                hf_module(module or model_type, patch)
                run = model if dtype == torch.float32 else copy.deepcopy(model).to(dtype)
                found: Tensor = (run.float() if wide else run)(tokens, use_cache=False).logits
                return found

        return logits

    return Case(name, save, rounds=rounds)


def fla(
    name: str,
    model_type: str,
    *,
    seed: int = 0,
    values: Mapping[str, Callable[[Tensor], Tensor]] = GATES,
    branches: float = 0.25,
    embedding: float = 1.0,
    bf16: float = 2e-2,
    **settings: Any,
) -> Case:
    """A checkpoint of FLA; the other arguments are those of :func:`hf`.

    Theirs computes in float32, in bfloat16 too: with weights rounded to it, by references that are made for float32.
    """

    def save(folder: Path) -> Oracle:
        torch.manual_seed(seed)
        model = fla_models.model(model_type, vocab_size=VOCABULARY, **settings)
        randomise(model, **values)
        settle(model, embedding, branches)
        model.save_pretrained(folder)

        def logits(tokens: Tensor, dtype: torch.dtype) -> Tensor:
            with pytest.MonkeyPatch.context() as patch, torch.no_grad():
                fla_models.plain(model_type, patch)
                run = model if dtype == torch.float32 else copy.deepcopy(model).to(dtype).float()
                found: Tensor = run(tokens, use_cache=False).logits
                return found

        return logits

    return Case(name, save, bf16=bf16)


@torch.no_grad()
def settle(model: Any, embedding: float, branches: float) -> None:
    """Sizes of the embedding, and of what layers add to the residual stream."""
    model.get_input_embeddings().weight.normal_(std=embedding)
    for weight_name, weight in model.named_parameters():
        if "experts" in weight_name and weight.dim() == 3:  # [E, to, from]
            # Seen, but not so large that a near tie, which bfloat16 may decide either way, shows more.
            weight.normal_(std=0.33 * weight.shape[-1] ** -0.5)
        if any(part in weight_name for part in BRANCH_ENDS):
            weight.mul_(branches)


def all_cases() -> list[Case]:
    """The cases of every ``test_*.py`` beside this file."""
    found: list[Case] = []
    for entry in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if entry.name.startswith("test_") and entry.name != "test_families":
            found += getattr(importlib.import_module(f"families.{entry.name}"), "CASES", [])
    return found
