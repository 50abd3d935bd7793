"""The pocket model's tokenizer: byte-level BPE over pieces that do not depend on what stands around them.

A model can copy a value out of a text only if the value has the same token ids wherever it stands.
Ordinary GPT-style tokenizers glue the space before a word to it, so ``telnet`` after a tab, after a
quote and after a space are three different tokens. Here the text is cut first into

- a newline with the indentation after it, a run of spaces, a run of tabs,
- a run of letters, a single digit, a run of underscores,
- any other single character,

and byte pairs are merged only inside such a piece. Every byte sequence that is UTF-8 text round trips.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from linstate.engine import tokens
from linstate.errors import ArgumentError, InputError
from linstate.files import write_atomically

__all__ = [
    "END_ID",
    "END_TOKEN",
    "PAD_ID",
    "PAD_TOKEN",
    "bytes_per_token",
    "encode_documents",
    "load_tokenizer",
    "save_tokenizer",
    "train_tokenizer",
]

PAD_TOKEN, END_TOKEN = "<|pad|>", "<|end|>"
PAD_ID, END_ID = 0, 1
PIECES = r"\n[ ]*|[ ]+|\t+|\p{L}[\p{L}\p{M}]*|\p{N}|_+|."
_SMALLEST = 256 + 2  # every byte, and the two special tokens


def train_tokenizer(texts: Iterable[str], vocab_size: int = 2048, *, longest: int = 16) -> Tokenizer:
    """Learns the merges.

    Args:
        texts: the sample; every text weighs by its length.
        vocab_size: token ids in all, special tokens included; 258 leaves bytes alone.
        longest: most bytes in one token.

    Returns:
        A tokenizer with ``<|pad|>`` = 0 and ``<|end|>`` = 1. The two are set by id only: the same
        characters inside a text are read as plain text.

    Raises:
        ArgumentError: ``vocab_size`` is below 258.

    >>> tokenizer = train_tokenizer(["key: value\\n"], 258)
    >>> tokenizer.decode(tokenizer.encode("kéy").ids)
    'kéy'
    """
    if vocab_size < _SMALLEST:
        raise ArgumentError(
            f"vocab_size: expected {_SMALLEST} or more (256 bytes, 2 special), got {vocab_size}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD_TOKEN, END_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=longest,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, path: str | os.PathLike[str]) -> Path:
    """Writes ``tokenizer.json`` so that a reader sees the old file or the new one, never a part."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, tokenizer.to_str(pretty=False).encode())
    return target


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads a saved tokenizer and makes it read special tokens inside a text as plain text.

    Raises:
        CheckpointError: the file is missing or is no tokenizer. InputError: its special tokens have other ids.
    """
    tokenizer = tokens.load_tokenizer(path)
    found = tokenizer.token_to_id(PAD_TOKEN), tokenizer.token_to_id(END_TOKEN)
    if found != (PAD_ID, END_ID):
        raise InputError(
            f"{path}: expected {PAD_TOKEN} = 0 and {END_TOKEN} = 1, found {found[0]} and {found[1]}"
        )
    return tokenizer


def encode_documents(tokenizer: Tokenizer, texts: Iterable[str], *, batch: int = 64) -> np.ndarray:
    """Token ids of all texts, each followed by ``<|end|>``: ``[T]`` uint16."""
    parts: list[np.ndarray] = []
    pending: list[str] = []

    def flush() -> None:
        for encoding in tokenizer.encode_batch_fast(pending, add_special_tokens=False):
            parts.append(np.array([*encoding.ids, END_ID], dtype=np.uint16))
        pending.clear()

    for text in texts:
        pending.append(text)
        if len(pending) == batch:
            flush()
    flush()
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint16)


def bytes_per_token(tokenizer: Tokenizer, text: str) -> float:
    """UTF-8 bytes of ``text`` for each of its tokens; 0.0 for an empty text."""
    count = len(tokens.encode(tokenizer, text))
    return len(text.encode()) / count if count else 0.0
