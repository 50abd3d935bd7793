"""Structured output: only tokens that a JSON schema allows (``llguidance``, extra ``serve``)."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from linstate.engine.jobs import Constraint
from linstate.engine.language_model import LanguageModel
from linstate.errors import InputError


class Grammars:
    """Makes constraints for a model."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model

    @cached_property
    def _tokenizer(self) -> Any:
        try:
            import llguidance
        except ImportError as error:
            raise InputError(
                "structured output needs the package llguidance: pip install 'linstate[serve]'"
            ) from error
        stop = self.model.ends
        if not isinstance(self.model.tokenizer, Tokenizer):
            raise InputError(
                "structured output needs a tokenizer.json; this model's vocabulary is of another kind"
            )
        return llguidance.LLTokenizer(
            self.model.tokenizer.to_str(),
            n_vocab=self.model.decoder.config.vocab_size,
            eos_token=stop[0] if stop else None,
        )

    def json(self, schema: dict[str, Any]) -> Callable[[], Constraint]:
        """Constraints for answers that follow ``schema``, one for each answer.

        Raises:
            InputError: the schema is none, or uses what the library does not serve.
        """
        from llguidance import LLMatcher

        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), {"whitespace_flexible": False})
            fault = LLMatcher.validate_grammar(grammar, self._tokenizer)
        except (ValueError, TypeError) as error:
            fault = str(error)
        if fault:
            raise InputError(f"the JSON schema cannot be followed: {fault}")
        return lambda: Grammar(LLMatcher(self._tokenizer, grammar), self.model.decoder.config.vocab_size)


class Grammar:
    """One answer under a grammar."""

    def __init__(self, matcher: Any, vocab: int) -> None:
        self._matcher, self._vocab = matcher, vocab

    def allow(self, logits: Tensor) -> Tensor:
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        allowed = torch.from_numpy(bits[: self._vocab].astype(bool)).to(logits.device)  # [vocab]
        if not bool(allowed.any()):
            raise InputError("the grammar allows no token here; make the schema simpler or allow more tokens")
        return torch.where(allowed, logits.float(), -torch.inf)

    def accept(self, token: int) -> bool:
        self._matcher.consume_token(token)
        return bool(self._matcher.is_stopped())
