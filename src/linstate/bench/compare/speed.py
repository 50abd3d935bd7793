"""Tokens per second on this machine: a small model of each mixer, all in turn, softmax attention first."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from linstate.bench.compare import sizes
from linstate.models import Decoder

D_MODEL, LAYERS, VOCABULARY = 256, 2, 256
DECODED = 16
"""Tokens decoded behind a text, one a call; their median counts."""


def measure(
    mixers: Sequence[str], lengths: Sequence[int], on_mixer: Callable[[str], None] = lambda name: None
) -> dict[str, Any]:
    """One round: by mixer and length, seconds to read a text of that length and seconds of a token decoded behind it."""
    found: dict[str, Any] = {}
    for name in mixers:
        on_mixer(name)
        torch.manual_seed(0)
        model = Decoder(sizes.config(name, VOCABULARY, D_MODEL, LAYERS)).eval()
        _once(model, 64)  # what happens at a first call only
        found[name] = {str(length): _once(model, length) for length in lengths}
    return found


@torch.no_grad()
def _once(model: Decoder, length: int) -> dict[str, float]:
    ids = torch.randint(VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0))
    begin = time.perf_counter()
    _, state = model(ids, logits="last")
    read, taken = time.perf_counter() - begin, []
    for _ in range(DECODED):
        begin = time.perf_counter()
        _, state = model(ids[:, :1], state, logits="last")
        taken.append(time.perf_counter() - begin)
    return {"prefill": read, "decode": statistics.median(taken)}


def summary(rounds: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """``[mixer]["prefill" or "decode"][length]``: tokens per second, and how many times those of softmax attention.

    Medians over the rounds, of the speeds and of the ratios within a round.
    """
    found: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for name, lengths in rounds[0].items():
        for length in lengths:
            for what in ("prefill", "decode"):
                tokens = int(length) if what == "prefill" else 1
                mine = [turn[name][length][what] for turn in rounds]
                base = [turn[sizes.BASE][length][what] for turn in rounds]
                found.setdefault(name, {}).setdefault(what, {})[length] = {
                    "tokens_per_second": tokens / statistics.median(mine),
                    "times_attention": statistics.median(b / m for b, m in zip(base, mine, strict=True)),
                }
    return found
