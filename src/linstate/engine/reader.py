"""Reading: token ids go into a state, block by block on a fixed grid of absolute positions.

A block of ``grid`` tokens is run only when a token behind it has come, so the tail always holds the newest token
and the state on the grid depends on the token ids alone. The same call with the same shape on the same numbers gives
the same bits: a state that was saved and restored, or found in a store, goes on as if nothing had happened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Literal

import torch

from linstate.engine.rows import stacked
from linstate.models import Decoder
from linstate.state.state import State, chain, now
from linstate.types import LayerState


class Reader:
    """Reads tokens from a state on; :meth:`state` gives the state at any moment.

    Args:
        on_block: called after each block that was run, to keep checkpoints (:meth:`on_grid`).
    """

    def __init__(
        self, decoder: Decoder, state: State, on_block: Callable[[Reader], None] | None = None
    ) -> None:
        self.decoder, self._start, self.on_block = decoder, state, on_block
        self.grid, self.tensors, self.chain = state.grid, state.tensors, state.chain
        self.tail, self.position = list(state.tail), state.position
        self.tokens = None if state.tokens is None else list(state.tokens)

    def feed(self, ids: Iterable[int]) -> int:
        """Read ``ids``; returns how many blocks were run. If it is interrupted, the blocks run so far are kept."""
        self.append(ids)
        blocks = 0
        while self.full:
            self.run_block()
            blocks += 1
        return blocks

    def append(self, ids: Iterable[int]) -> None:
        """Put ``ids`` behind the tail and run nothing: for those who run the blocks themselves while :attr:`full`."""
        before = len(self.tail)
        self.tail.extend(ids)
        self.position += len(self.tail) - before
        if self.tokens is not None:
            self.tokens.extend(self.tail[before:])

    @property
    def full(self) -> bool:
        """Whether a block is to be run."""
        return len(self.tail) > self.grid

    def run_block(self) -> None:
        """Run the first ``grid`` tokens of the tail."""
        block = self.tail[: self.grid]
        _, tensors = call(self.decoder, block, self.tensors, "none")
        self.tensors, self.chain, self.tail = tensors, chain(self.chain, block), self.tail[self.grid :]
        if self.on_block is not None:
            self.on_block(self)

    @property
    def grid_position(self) -> int:
        """Tokens that have been run: the grid position of the tensors."""
        return self.position - len(self.tail)

    def on_grid(self) -> State:
        """The state behind the last block, without what hangs over: a checkpoint that any text with this beginning can use."""
        at = self.grid_position
        tokens = None if self.tokens is None else tuple(self.tokens[:at])
        return replace(self.state(), position=at, tail=(), tokens=tokens)

    def state(self, calls: tuple[int, ...] = (), rows: int = 1) -> State:
        """The state now. Tokens that were fed but not yet run count only as far as the grid allows."""
        return replace(
            self._start,
            tensors=self.tensors,
            position=self.position,
            tail=tuple(self.tail),
            calls=calls,
            rows=rows if calls else 1,
            chain=self.chain,
            tokens=None if self.tokens is None else tuple(self.tokens),
            created=now(),
        )


def call(
    decoder: Decoder,
    ids: list[int],
    tensors: LayerState,
    logits: Literal["all", "last", "none"],
    rows: int = 1,
) -> tuple[torch.Tensor, LayerState]:
    """One model call on ``ids`` from ``tensors`` (one row), without gradients.

    With ``rows`` the row runs among that many copies of itself: matrix products of another number of rows round
    differently, so a token that was once run in a batch is run again in a batch (:mod:`linstate.engine.slots`).
    """
    tokens = torch.tensor([ids] * rows, dtype=torch.int64, device=decoder.embedding.weight.device)
    if rows > 1:
        tensors = stacked([tensors], rows)
    with torch.no_grad():
        out, after = decoder(tokens, tensors, logits=logits)
    if rows > 1:
        out, after = out[:1], {name: t[:1] for name, t in after.items()}
    return out, after
