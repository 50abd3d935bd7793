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

SHARES = {"newline": 0.5, "word": 0.5, "mark": 0.7}
"""How long the direction of a class is, beside the rest of a token's embedding."""


def classes(tokenizer: Tokenizer, vocab_size: int) -> dict[str, torch.Tensor]:
    """For each class which tokens are of it, bool ``[vocab]``."""
    found = {name: torch.zeros(vocab_size, dtype=torch.bool) for name in SHARES}
    for token in range(tokenizer.get_vocab_size()):
        text = tokenizer.decode([token])
        name = "newline" if "\n" in text else "word" if re.search(r"[^\W_]", text) else "mark"
        found[name][token] = True
    return found


@torch.no_grad()
def begin(model: Decoder, tokenizer: Tokenizer) -> None:
    """Give a new model's embedding a direction for each class, and its keyed windows gates that read them."""
    windows = [m for m in model.modules() if isinstance(m, KeyedWindow)]
    if not windows:
        return
    embedding = model.embedding.weight
    frame = torch.nn.init.orthogonal_(torch.empty(len(SHARES), embedding.shape[1]))
    direction = dict(zip(SHARES, frame, strict=True))
    length = embedding.norm(dim=-1).mean()
    for name, members in classes(tokenizer, embedding.shape[0]).items():
        embedding[members] += SHARES[name] * length * direction[name]
    for window in windows:
        window.begin_entries(direction["word"], direction["newline"])
