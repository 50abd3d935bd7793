"""Texts to token ids: refusals that cost no more than what is taken."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer

from linstate import LanguageModel
from linstate.engine.tokens import encode, encode_at_most
from small_models import tokenizer


@pytest.mark.parametrize("tokenizer", [tokenizer(), LanguageModel.from_pretrained("pocket").tokenizer])
def test_a_text_of_too_many_tokens_is_found_out_in_pieces(tokenizer: Tokenizer) -> None:
    text = "a key: of some value\n" * 20_000  # several pieces
    whole = encode(tokenizer, text)
    assert encode_at_most(tokenizer, text, len(whole)) == whole
    assert encode_at_most(tokenizer, text, len(whole) - 1) is None
    assert encode_at_most(tokenizer, text, len(whole), goes_on=True) == encode(tokenizer, text, goes_on=True)
