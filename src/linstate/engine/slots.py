"""Decoding many conversations at once, each to the same bits as if it were alone.

The states of the conversations are stacked to one state of B rows, one slot each, and a step is one model call
``[B, 1]``. Matrix states have a fixed size, so a slot has too; keys and values are kept row by row (:mod:`linstate.engine.rows`), so
rows of any length run together. Nothing is paged.

**A row does not depend on its neighbours.** Matrix products round differently for different numbers of rows: one row is
a matrix-vector product, two or three take other kernels than four. So a step never runs fewer than :data:`ROWS` rows (empty
slots hold copies), and larger batches are used only in the sizes that were found, on this machine and with these weights,
to give the bits of :data:`ROWS` rows. Where a size gives other bits, the slots run :data:`ROWS` at a time. A state that is
taken from such a generation says in how many rows its tokens ran (``State.rows``), and is replayed so.

The price: one conversation alone pays for :data:`ROWS` rows. Weights are read once either way, so it is small where
decoding is bound by memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from linstate.engine.generation import Live
from linstate.engine.rows import by_row, dense, stacked
from linstate.models import Decoder
from linstate.types import LayerState

ROWS = 8


class Slots:
    """Runs the newest token of many :class:`Live` ends, all made with ``rows=ROWS``.

    Args:
        most: slots that may be in use at once, or for whose states there is memory.
    """

    def __init__(self, decoder: Decoder, most: int = 32) -> None:
        self.decoder = decoder
        self.sizes = [ROWS]
        while self.sizes[-1] < most and _same_bits(decoder, 2 * self.sizes[-1]):
            self.sizes.append(2 * self.sizes[-1])

    @property
    def widest(self) -> int:
        """Rows of the largest call."""
        return self.sizes[-1]

    def step(self, lives: Sequence[Live]) -> list[Tensor]:
        """Run the newest token of each; returns logits ``[vocab]`` of the next token of each, in order."""
        found: dict[int, Tensor] = {}
        for group in _alike(lives):
            for at in range(0, len(group), self.widest):
                part = group[at : at + self.widest]
                logits = self._call([lives[i] for i in part])
                found.update(zip(part, logits, strict=True))
        return [found[i] for i in range(len(lives))]

    def _call(self, lives: list[Live]) -> Iterable[Tensor]:
        size = next(n for n in self.sizes if n >= len(lives))
        ids = [live.reader.tail[-1] for live in lives]
        tokens = torch.tensor(ids + ids[:1] * (size - len(ids)), device=self.decoder.embedding.weight.device)
        with torch.no_grad():
            logits, after = self.decoder(tokens[:, None], _stacked(self.decoder, lives, size), logits="last")
        for row, live in enumerate(lives):
            live.ran(after, row)
        return logits[: len(lives), -1].unbind(0)


def _stacked(decoder: Decoder, lives: list[Live], size: int) -> LayerState:
    """The states of ``lives`` as one of ``size`` rows; the last step's result as it is, where it holds just them."""
    stack = lives[0].stack
    same = stack is not None and all(
        live.stack is stack and live.row == row for row, live in enumerate(lives)
    )
    if same and stack is not None and len(next(iter(stack.values()))) == size:
        return stack
    return stacked([by_row(decoder, live.tensors) for live in lives], size)


def _alike(lives: Sequence[Live]) -> Iterable[list[int]]:
    """The numbers of those whose states have the same shapes: all, unless something grows with the text that is not kept row by
    row."""
    groups: dict[tuple[torch.Size, ...], list[int]] = {}
    known: dict[int, tuple[torch.Size, ...]] = {}  # by stack: the rows of one have the same
    for i, live in enumerate(lives):
        shapes = known.get(id(live.stack)) if live.stack is not None else None
        if shapes is None:
            shapes = known[id(live.stack)] = live.shapes
        groups.setdefault(shapes, []).append(i)
    return groups.values()


def _same_bits(decoder: Decoder, size: int) -> bool:
    """Whether ``size`` rows give the bits of :data:`ROWS` rows, on random tokens, from states that have read something."""
    generator = torch.Generator().manual_seed(0)
    device = decoder.embedding.weight.device
    tokens = torch.randint(decoder.config.vocab_size, (size, 12), generator=generator).to(device)
    with torch.no_grad():
        _, state = decoder(tokens[:, :8], logits="none")
        state = by_row(decoder, state)
        few = {name: t[:ROWS] for name, t in state.items()}
        last = {name: t[-ROWS:] for name, t in state.items()}
        for at in range(8, tokens.shape[1]):
            many, state = decoder(tokens[:, at : at + 1], state, logits="last")
            head, few = decoder(tokens[:ROWS, at : at + 1], few, logits="last")
            foot, last = decoder(tokens[-ROWS:, at : at + 1], last, logits="last")
            if not torch.equal(many[:ROWS], head) or not torch.equal(many[-ROWS:], foot):
                return False
    state, few, last = (dense(decoder, held) for held in (state, few, last))
    return all(
        torch.equal(t[:ROWS], few[name]) and torch.equal(t[-ROWS:], last[name]) for name, t in state.items()
    )
