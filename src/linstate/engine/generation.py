"""Generation: one token at a time from a state, replayable to the bit.

The live state of a generation is the state on the grid, then the calls that ran the tail: first the prompt's rest in
one call, then a call for each token. A state that is taken in the middle says which calls these were, so a new process
runs the same ones. When the tail fills a block, the block is read as reading does it, and the live state starts anew.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from linstate.engine.reader import Reader, call
from linstate.errors import InputError
from linstate.models import Decoder
from linstate.state.state import State


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token. top_k: only the k likeliest (0: all). top_p: only the likeliest that
            together have this probability. seed: for the same choices again.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise InputError(
                "temperature must be >= 0, top_k >= 0 and 0 < top_p <= 1; "
                f"got {self.temperature}, {self.top_k}, {self.top_p}"
            )

    def choose(self, logits: Tensor, generator: torch.Generator) -> int:
        """A token from logits ``[vocab]``."""
        logits = logits.float()
        if self.temperature == 0:
            return int(logits.argmax())
        weights = (logits / self.temperature).softmax(-1)
        order = weights.argsort(descending=True)
        ordered = weights[order]
        keep = ordered.cumsum(0) - ordered < self.top_p
        if self.top_k:
            keep[self.top_k :] = False
        ordered = torch.where(keep, ordered, 0.0)
        return int(order[torch.multinomial(ordered, 1, generator=generator)])


class Live:
    """The live end of a state: logits for the next token, and a way to add it."""

    def __init__(self, decoder: Decoder, state: State) -> None:
        self.decoder, self.reader = decoder, Reader(decoder, state)
        self.calls: list[int] = []
        self.tensors = self.reader.tensors
        for size in state.calls:
            self._run(size)

    def _run(self, size: int) -> Tensor:
        done = sum(self.calls)
        logits, self.tensors = call(self.decoder, self.reader.tail[done : done + size], self.tensors, "last")
        self.calls.append(size)
        return logits[0, -1]  # [vocab]

    def logits(self) -> Tensor:
        """Logits ``[vocab]`` of the next token. Raises InputError when nothing was ever read."""
        rest = len(self.reader.tail) - sum(self.calls)
        if rest == 0:
            raise InputError("there is nothing to go on from: read a text or give a prompt first")
        return self._run(rest)

    def add(self, token: int) -> None:
        """Append a token; it is run when logits are asked for."""
        if self.reader.feed([token]):
            self.tensors, self.calls = self.reader.tensors, []

    def state(self) -> State:
        """The state here, with what is needed to go on to the bit."""
        return self.reader.state(tuple(self.calls))


def generate(
    decoder: Decoder, state: State, sampling: Sampling, ends: Collection[int], limit: int
) -> Iterator[tuple[int, State]]:
    """At most ``limit`` tokens from ``state`` on, each with the state after it; ends before a token of ``ends``."""
    live = Live(decoder, state)
    generator = torch.Generator().manual_seed((sampling.seed * 1_000_003 + state.position) % 2**63)
    for _ in range(limit):
        token = sampling.choose(live.logits(), generator)
        if token in ends:
            return
        live.add(token)
        yield token, live.state()
