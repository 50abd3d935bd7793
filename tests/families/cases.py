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

from oracles.oracle import hf_module, randomise

VOCABULARY = 97
Oracle = Callable[[Tensor, torch.dtype], Tensor]
"""Token ids ``[B, T]`` and the dtype of the weights -> logits ``[B, T, vocabulary]``, the whole text at once."""

GATES = {"A_log": lambda u: 2 * u - 2, "dt_bias": lambda u: 2 * u - 4}
"""Decays that neither vanish nor forget at once."""


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
    **settings: Any,
) -> Case:
    """A checkpoint of transformers.

    Args:
        module: the folder of its modeling file, where it has not the name of the model type.
        values: initial values by the ends of parameters' names, as in ``oracles.oracle.randomise``.
        adjust: what more there is to do to the weights.
        settings: of its configuration.
    """

    def save(folder: Path) -> Oracle:
        with pytest.MonkeyPatch.context() as patch:
            hf_module(module or model_type, patch)
            from transformers import AutoConfig, AutoModelForCausalLM

            torch.manual_seed(seed)
            config = AutoConfig.for_model(model_type, vocab_size=VOCABULARY, **settings)
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
            randomise(model, **values)
            with torch.no_grad():
                for buffer_name, buffer in model.named_buffers():
                    if buffer_name.endswith("e_score_correction_bias"):
                        buffer.normal_(std=0.2)
                if adjust is not None:
                    adjust(model)
            model.save_pretrained(folder)

        def logits(tokens: Tensor, dtype: torch.dtype) -> Tensor:
            with pytest.MonkeyPatch.context() as patch, torch.no_grad():
                hf_module(module or model_type, patch)
                run = model if dtype == torch.float32 else copy.deepcopy(model).to(dtype)
                found: Tensor = run(tokens, use_cache=False).logits
                return found

        return logits

    return Case(name, save, rounds=rounds)


def all_cases() -> list[Case]:
    """The cases of every ``test_*.py`` beside this file."""
    found: list[Case] = []
    for entry in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if entry.name.startswith("test_") and entry.name != "test_families":
            found += getattr(importlib.import_module(f"families.{entry.name}"), "CASES", [])
    return found
