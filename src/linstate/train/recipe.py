"""A training recipe: one TOML file that says what is trained, on what and how."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from linstate.errors import InputError
from linstate.models import ModelConfig


@dataclass(frozen=True)
class Recipe:
    """What ``linstate train`` needs to know; times are in optimiser steps, sizes in tokens.

    Attributes:
        model: the architecture (its vocabulary size is the tokenizer's).
        vocab_size: entries of the tokenizer that is trained when the work folder has none.
        steps: optimiser steps.
        tokens_per_step: tokens of one step; a step at length T holds tokens_per_step / T sequences.
        lengths: ``[[progress, T], ...]`` the curriculum of sequence lengths.
        learning_rate, warmup_steps, decay_steps, weight_decay, max_grad_norm: Muon and
            AdamW with a warm-up, a plateau and a decay to 0.
        lookup_share: ``[[progress, share], ...]`` the share of examples that are lookup documents, from a progress on.
        drill_share: the same for the share of these that are drills (:mod:`linstate.train.drill`).
        drill_parts: the same for the most words in a key or value of a drill.
        document_share: share of lookup documents whose own text is learned too.
        even_styles: share of lookup documents whose style is drawn with equal chances.
        emphasis: ``{style = share}``, shares of lookup documents that are of a style come what may.
        facts: most facts in a lookup document at the end of the curriculum.
        curriculum: the part of the stream's curriculum that is walked through, from and to a progress in [0, 1].
        mixture: weights of standard library, its tests and documentation in the plain text.
        answer_weight: what a token of an answer weighs in the loss, beside 1 for a token of plain text.
        save_steps, log_steps, seed.
    """

    model: dict[str, Any]
    steps: int
    vocab_size: int = 2048
    tokens_per_step: int = 4096
    lengths: list[list[float]] = field(default_factory=lambda: [[0.0, 512]])
    learning_rate: float = 3e-3
    beta2: float = 0.98
    warmup_steps: int = 200
    decay_steps: int = 1000
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0
    lookup_share: list[list[float]] = field(default_factory=lambda: [[0.0, 0.5]])
    drill_share: list[list[float]] = field(default_factory=lambda: [[0.0, 0.0]])
    drill_parts: list[list[float]] = field(default_factory=lambda: [[0.0, 1]])
    document_share: float = 0.1
    even_styles: float = 0.0
    emphasis: dict[str, float] = field(default_factory=dict)
    facts: int = 80
    curriculum: list[float] = field(default_factory=lambda: [0.0, 1.0])
    mixture: list[float] = field(default_factory=lambda: [0.7, 0.1, 0.2])
    answer_weight: float = 3.0
    save_steps: int = 200
    log_steps: int = 20
    seed: int = 0

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe. Raises InputError that names the file and the field."""
        try:
            raw = tomllib.loads(Path(path).read_text("utf-8"))
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise InputError(f"cannot read the recipe {path}: {error}") from error
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(raw) - known)
        missing = sorted({"model", "steps"} - set(raw))
        if unknown or missing:
            wrong = [f"unknown: {', '.join(unknown)}"] * bool(unknown) + [
                f"missing: {', '.join(missing)}"
            ] * bool(missing)
            raise InputError(f"recipe {path}: {'; '.join(wrong)}; a recipe has: {', '.join(sorted(known))}")
        return cls(**raw)

    def config(self) -> ModelConfig:
        """The architecture with the tokenizer's vocabulary. Raises ConfigError."""
        return ModelConfig.from_dict({**self.model, "vocab_size": self.vocab_size})
