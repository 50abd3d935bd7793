"""Generation: one token at a time from a state, replayable to the bit.

The live state of a generation is the state on the grid, then the calls that ran the tail: first the prompt's rest in
one call, then a call for each token. A state that is taken in the middle says which calls these were, so a new process
runs the same ones. When the tail fills a block, the block is read as reading does it, and the live state starts anew.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from linstate.engine.reader import Reader, call
from linstate.engine.rows import by_row, caches, dense
from linstate.errors import InputError, ModelError
from linstate.models import Decoder
from linstate.state.state import State
from linstate.types import LayerState

_COLDEST = 1e-6
"""Below this temperature the likeliest token is taken: logits divided by less overflow, and no other token has a chance."""


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
        """A token from logits ``[vocab]``, of which at least one is a number and none is NaN. Raises ModelError."""
        logits = logits.float()
        token = int(logits.argmax())
        if not logits[token].isfinite():
            raise ModelError(
                "the model's logits are not finite: its weights or its state hold NaN or Inf, or its numbers overflow in this dtype"
            )
        if self.temperature < _COLDEST:
            return token
        weights = (logits / self.temperature).softmax(-1)
        if self.top_k == 0 and self.top_p == 1:  # nothing is left out, so nothing need be put in order
            upto = weights.double().cumsum(0)  # [vocab]
            drawn = torch.rand((), generator=generator, dtype=torch.float64).to(upto.device) * upto[-1]
            return min(int(torch.searchsorted(upto, drawn, right=True)), len(upto) - 1)
        order = weights.argsort(descending=True)
        ordered = weights[order]
        keep = ordered.cumsum(0) - ordered < self.top_p
        keep[0] = True  # however small top_p is
        if self.top_k:
            keep[self.top_k :] = False
        ordered = torch.where(keep, ordered, 0.0)
        return int(order[torch.multinomial(ordered, 1, generator=generator)])


class Live:
    """The live end of a state: logits for the next token, and a way to add it.

    Calls of one token run among ``rows`` rows (:func:`linstate.engine.reader.call`): those of the state, while it
    has calls to be replayed, else the argument's.
    """

    def __init__(self, decoder: Decoder, state: State, rows: int = 1) -> None:
        self.decoder, self.reader = decoder, Reader(decoder, state)
        self.calls: list[int] = []
        self.stack: LayerState | None = None
        self.row = 0
        self._tensors = self.reader.tensors
        self.rows, self._rows = state.rows if state.calls else rows, rows
        self.to_replay = list(state.calls)

    @property
    def tensors(self) -> LayerState:
        """The state behind the calls so far, one row."""
        if self.stack is None:
            return self._tensors
        return {name: t[self.row : self.row + 1] for name, t in self.stack.items()}

    @tensors.setter
    def tensors(self, tensors: LayerState) -> None:
        self._tensors, self.stack = tensors, None

    @property
    def shapes(self) -> tuple[torch.Size, ...]:
        """Shapes of one row of the state, in the order of its names, without what is kept row by row."""
        apart = caches(self.decoder)
        return tuple(t.shape[1:] for name, t in (self.stack or self._tensors).items() if name not in apart)

    def ran(self, stack: LayerState, row: int) -> None:
        """The newest token was run elsewhere, as row ``row`` of a batch whose state is now ``stack``."""
        self.stack, self.row, self._tensors = stack, row, {}
        self.calls.append(1)

    def _run(self, size: int) -> Tensor:
        done = sum(self.calls)
        ids = self.reader.tail[done : done + size]
        rows = self.rows if size == 1 else 1
        logits, self.tensors = call(self.decoder, ids, by_row(self.decoder, self.tensors), "last", rows)
        self.calls.append(size)
        return logits[0, -1]  # [vocab]

    def append(self, ids: Iterable[int]) -> None:
        """Text behind a state, to be read with :meth:`run_block` and :meth:`logits`; what was generated before it counts as
        read: nothing is replayed, and the tail runs as one call."""
        self.reader.append(ids)
        self.to_replay.clear()
        self.rows = self._rows

    def run_block(self) -> None:
        """Read a full block; the live state starts anew behind it."""
        self.reader.run_block()
        self.tensors, self.calls, self.rows = self.reader.tensors, [], self._rows

    def replay(self) -> None:
        """Run again the next of the calls that the state says were run."""
        self._run(self.to_replay.pop(0))

    def logits(self) -> Tensor:
        """Logits ``[vocab]`` of the next token. Raises InputError when nothing was ever read."""
        while self.to_replay:
            self.replay()
        rest = len(self.reader.tail) - sum(self.calls)
        if rest == 0:
            raise InputError("there is nothing to go on from: read a text or give a prompt first")
        return self._run(rest)

    def add(self, token: int) -> None:
        """Append a token; it is run when logits are asked for."""
        while self.to_replay:
            self.replay()
        self.reader.append([token])
        while self.reader.full:
            self.run_block()

    def state(self) -> State:
        """The state here, with what is needed to go on to the bit."""
        return self.reader.state((*self.calls, *self.to_replay), self.rows)

    def settled(self) -> State:
        """The state with its tail run too, so that what follows runs new tokens only; the grid starts anew behind it.

        It depends on the calls that ran the tail, not on the tokens alone.
        """
        while self.reader.full:
            self.run_block()
        while self.to_replay:
            self.replay()
        if rest := len(self.reader.tail) - sum(self.calls):
            self._run(rest)
        before = self.reader.state()
        return replace(
            before,
            tensors=dense(self.decoder, self.tensors, own=True),  # a row would hold the whole batch
            tail=(),
            origin=before.position,
            lineage=(*before.lineage, before.id),
        )


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
