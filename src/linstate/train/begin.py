"""What a model knows of its tokenizer before it has learned anything: which tokens end an entry, and which are words.

Tokens of one class share a direction of the embedding: those that hold a newline, words and digits, and the marks between a key
and its value. Layers of keyed windows begin with gates that read these directions (:meth:`KeyedWindow.begin_entries`). All of it is
learned further like any other weight.
"""

from __future__ import annotations

import re

import torch
from tokenizers import Tokenizer

from linstate.mixers.keyed_window import KeyedWindow
from linstate.models import Decoder

SHARES = {"newline": 0.5, "indented": 0.17, "word": 0.5, "mark": 0.7}
"""How far tokens of a class lie along its direction, beside the rest of their embedding. A newline with indentation behind it lies
a little way along that of a newline: what is indented may belong to the line before, so some of the entry outlives it."""


def classes(tokenizer: Tokenizer, vocab_size: int) -> dict[str, torch.Tensor]:
    """For each class which tokens are of it, bool ``[vocab]``."""
    found = {name: torch.zeros(vocab_size, dtype=torch.bool) for name in SHARES}
    for token in range(tokenizer.get_vocab_size()):
        text = tokenizer.decode([token])
        newline = "indented" if text.startswith("\n ") else "newline"
        name = newline if "\n" in text else "word" if re.search(r"[^\W_]", text) else "mark"
        found[name][token] = True
    return found


@torch.no_grad()
def begin(model: Decoder, tokenizer: Tokenizer) -> None:
    """Give a new model's embedding a direction for each class, and its keyed windows gates that read them."""
    windows = [m for m in model.modules() if isinstance(m, KeyedWindow)]
    if not windows:
        return
    embedding = model.embedding.weight
    newline, word, mark = torch.nn.init.orthogonal_(torch.empty(3, embedding.shape[1]))
    direction = {"newline": newline, "indented": newline, "word": word, "mark": mark}
    length = embedding.norm(dim=-1).mean()
    for name, members in classes(tokenizer, embedding.shape[0]).items():
        embedding[members] += SHARES[name] * length * direction[name]
    for window in windows:
        window.begin_entries(word, newline)
