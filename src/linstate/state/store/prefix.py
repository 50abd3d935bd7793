"""Which stored state has read the longest beginning of a text: exact, by hash chain of token ids.

A state stands on a grid position and knows the chain of the blocks before it; what hangs over the grid are its tail's
ids. So (tenant, model, chain) is its **place**, and (place, tail) its **key**; a text has one place for each grid block and
one key for each token in it. Two texts share a key only if they share every token before it (SHA-256).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from linstate.state.state import State

START = "00" * 32


def place(tenant: str, model: str, chain: str) -> bytes:
    """Where a state stands: the tenant, its model, the blocks that it has read."""
    return hashlib.sha256(b"\0".join((tenant.encode(), model.encode(), chain.encode()))).digest()


def key(at: bytes, tail: Sequence[int]) -> bytes:
    """All that a state has read: its place and the ids of its tail."""
    return hashlib.sha256(at + np.asarray(tail, dtype="<i4").tobytes()).digest()


def findable(state: State) -> bool:
    """Whether the state is a function of the token ids alone, bit by bit: read from nothing, on the grid, stored exactly."""
    return (
        state.position > 0
        and state.origin == 0
        and state.composition is None
        and state.precision == "exact"
        and state.precision_error == 0
    )


def chains(ids: Sequence[int], grid: int) -> Iterator[str]:
    """The chain after each whole block of ``ids``, that of no block first."""
    data, chain = np.asarray(ids, dtype="<i4").tobytes(), START
    yield chain
    for end in range(4 * grid, len(data) + 1, 4 * grid):
        chain = hashlib.sha256(bytes.fromhex(chain) + data[end - 4 * grid : end]).hexdigest()
        yield chain


def keys(at: bytes, ids: Sequence[int]) -> list[bytes]:
    """The keys of a state at place ``at`` whose tail is empty, ``ids[:1]``, ``ids[:2]``, ... all of ``ids``.

    A state with an empty tail has no newest token to go on from, so it cannot stand for a text that ends there: without
    ``ids`` there are no keys.
    """
    running = hashlib.sha256(at)
    found = [running.digest()] if len(ids) else []
    for id in np.asarray(ids, dtype="<i4"):
        running.update(id.tobytes())
        found.append(running.copy().digest())
    return found


@dataclass(frozen=True)
class Checkpoints:
    """Where a long text is worth keeping on the way: at ``first`` tokens, and each ``ratio`` times as far.

    A text of N tokens then costs log(N / first) states, and one that shares only its first n tokens with it is
    read from n / ratio at the latest.

    >>> [p for p in range(256, 20_000, 256) if Checkpoints().due(p, 256)]
    [1024, 2048, 4096, 8192, 16384]
    """

    first: int = 1024
    ratio: float = 2.0

    def due(self, position: int, grid: int) -> bool:
        """Whether the state at this grid position is one to keep."""
        if position < self.first:
            return False
        marks = math.floor(math.log(position / self.first) / math.log(self.ratio) + 1e-9)
        return position - grid < self.first * self.ratio**marks
