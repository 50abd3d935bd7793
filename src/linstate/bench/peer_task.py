"""What a peer of ``bench model`` is asked to measure."""

from __future__ import annotations

import time
from dataclasses import dataclass

DECODE_FROM = 256
"""Tokens read before those that are decoded, as in ours."""


@dataclass(frozen=True)
class Task:
    """What a peer is asked to measure.

    Attributes:
        peer: "transformers" or "llama.cpp". folder: the checkpoint, as ``model_cases.write_checkpoint`` writes it.
        prefill: lengths. tokens: of a decode. rounds: of which the median is taken, for lengths up to 2,048.
        clock: a function of :mod:`time`. source: the folder of llama.cpp's converter.
    """

    peer: str
    folder: str
    prefill: tuple[int, ...]
    tokens: int
    rounds: int
    threads: int
    clock: str
    source: str = ""

    def turns(self, tokens: int) -> int:
        return self.rounds if tokens <= 2048 else 1

    def now(self) -> float:
        seconds: float = getattr(time, self.clock)()
        return seconds
