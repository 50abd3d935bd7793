"""Small tasks that tell architectures apart: recall, selective copying, parity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from linstate.errors import ArgumentError

IGNORED = -100
"""The label of a position that is not asked."""

Batch = tuple[Tensor, Tensor]
"""Tokens ``[B, T]`` and labels ``[B, T]``: what is to be predicted at a position, or :data:`IGNORED`."""

Draw = Callable[[int, Generator], Batch]
"""So many rows of a task, drawn."""


@dataclass(frozen=True)
class Task:
    """What to train on, in turn, and what to test on by name.

    ``chance``: the accuracy of guessing. ``judged``: the test that evidence speaks of. ``enough``: a loss, in nats,
    below which nothing more is to be learned.
    """

    vocab_size: int
    train: tuple[Draw, ...]
    test: dict[str, Draw]
    chance: float
    judged: str
    enough: float = 0.0


def recall(rows: int, draw: Generator, *, vocab_size: int, tokens: int, pairs: int) -> Batch:
    """Multi-query associative recall: pairs of a key and a value, then every key once more: what was its value?

    Keys are from the lower half of the vocabulary, values from the upper; the place of a question is at an even distance
    behind the pairs, drawn by a power law with exponent 0.01 - 1; between the questions stand random tokens.

    Source: Arora 2023 (Zoology), arXiv 2312.04927, appendix E, with its code's defaults.
    """
    if tokens % 2 or 4 * pairs > tokens or pairs >= vocab_size // 2:
        raise ArgumentError(f"recall: {pairs} pairs need at least {4 * pairs} tokens, even, got {tokens}")
    half, context = vocab_size // 2, 2 * pairs
    keys = torch.rand(rows, half - 1, generator=draw).topk(pairs).indices + 1  # [B, pairs]
    values = torch.rand(rows, vocab_size - half, generator=draw).topk(pairs).indices + half
    places = torch.arange(1, (tokens - context) // 2 + 1, dtype=torch.float64) ** (0.01 - 1)
    gaps = torch.multinomial(places.expand(rows, -1), pairs, generator=draw)  # [B, pairs]
    ids = torch.randint(vocab_size, (rows, tokens), generator=draw)
    ids[:, 0:context:2], ids[:, 1:context:2] = keys, values
    ids.scatter_(1, context + 2 * gaps, keys)
    labels = torch.full_like(ids, IGNORED).scatter_(1, context + 2 * gaps, values)
    return ids, labels


def selective_copying(rows: int, draw: Generator, *, letters: int, tokens: int, marked: int) -> Batch:
    """``marked`` letters stand somewhere among ``tokens`` blanks; behind them as many marks ask for the letters in order.

    Source: Gu & Dao 2023 (Mamba), arXiv 2312.00752, section 3.1.
    """
    blank, mark = letters, letters + 1
    places = torch.rand(rows, tokens, generator=draw).topk(marked).indices.sort().values  # [B, marked]
    said = torch.randint(letters, (rows, marked), generator=draw)
    ids = torch.full((rows, tokens + marked), blank).scatter_(1, places, said)
    ids[:, tokens:] = mark
    labels = torch.full_like(ids, IGNORED)
    labels[:, tokens:] = said
    return ids, labels


def parity(rows: int, draw: Generator, *, tokens: int, asked: int = 0) -> Batch:
    """At every bit: is the number of ones so far odd? Only the positions from ``asked`` on count.

    Source: Grazzi 2024, arXiv 2411.12537, section 5.1.
    """
    bits = torch.randint(2, (rows, tokens), generator=draw)
    labels = bits.cumsum(1) % 2
    labels[:, :asked] = IGNORED
    return bits, labels


def recalled(tokens: int, pairs: int) -> Draw:
    return lambda rows, draw: recall(rows, draw, vocab_size=128, tokens=tokens, pairs=pairs)


def copied(tokens: int) -> Draw:
    return lambda rows, draw: selective_copying(rows, draw, letters=16, tokens=tokens, marked=6)


def counted(first: int, last: int) -> Draw:
    return lambda rows, draw: parity(rows, draw, tokens=last, asked=first)


TASKS = {
    "recall": Task(
        128,
        (recalled(32, 4), recalled(32, 8)),
        {"4 pairs": recalled(32, 4), "8 pairs": recalled(32, 8), "16 pairs, longer": recalled(64, 16)},
        1 / 64,
        "8 pairs",
        0.02,
    ),
    "copying": Task(
        18,
        (copied(32),),
        {"6 among 32": copied(32), "6 among 64, longer": copied(64)},
        1 / 16,
        "6 among 32",
        0.02,
    ),
    "parity": Task(
        2,
        (counted(0, 40),),
        {
            "bits 1 to 40": counted(0, 40),
            "41 to 80, longer": counted(40, 80),
            "81 to 160, longer": counted(80, 160),
        },
        1 / 2,
        "81 to 160, longer",
    ),
}
"""The tasks by name; "longer" is longer than anything in training."""
