"""Segments that stand at fixed places of a row's text, wherever the calls that read it begin and end.

Some recurrences change only at the end of every C tokens: an inner mini-batch, a segment whose state is put away, a
chunk that moves a fast weight. A row that has read ``count`` tokens of its unfinished segment goes on in the middle of
it. So that every cut gives the same, tokens are laid into the slots of their segments, and each row may stand
elsewhere in its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linstate.ops.checks import check_cu_seqlens, check_lengths


class Slots:
    """The slots of one call: which segment, and which place in it, every token of ``x [B, T, ...]`` has.

    Attributes:
        count: ``[B]`` int64, tokens of the unfinished segment before the call (``[N]`` for N packed sequences).
        after: the same behind it.
        segments: how many segments the longest row touches, at least one.
        last: ``[B]`` the segment in which a row goes on; ``segments`` where the last of them is full.
        complete: ``[B, segments]`` the segments that are full at the end of the call.
        done: how many segments the fastest row completes: behind them nothing changes.
        used: the slots that the tokens of this call take, where all are in one segment (a step of decoding is one
            slot, not C); else all.
    """

    def __init__(self, x: Tensor, count: Tensor | None, size: int, cu_seqlens: Tensor | None = None) -> None:
        batch, tokens = x.shape[:2]
        self.size, self.shape, device = size, (batch, tokens), x.device
        if cu_seqlens is None:
            lengths = torch.full((batch,), tokens, device=device)
            offset = torch.arange(tokens, device=device).repeat(batch)  # [B T]
        else:
            check_cu_seqlens("Slots", cu_seqlens, batch, tokens)
            bounds = cu_seqlens.to(device, torch.int64)
            lengths = bounds.diff()
            offset = torch.arange(tokens, device=device) - bounds[:-1].repeat_interleave(lengths)
        self.count = torch.zeros_like(lengths) if count is None else count
        check_lengths("Slots", self.count, size - 1, "count")
        self.row = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
        self.slot = offset + self.count[self.row]
        self.end = self.count + lengths
        self.segments = max(1, -(-int(self.end.max()) // size)) if len(lengths) else 1
        self.last, self.after = self.end // size, self.end % size
        self.complete = torch.arange(self.segments, device=device) < self.last[:, None]
        self.done = int(self.last.max()) if len(lengths) else 0
        one = self.segments == 1 and len(lengths) > 0
        self.used = slice(int(self.count.min()), int(self.end.max())) if one else slice(0, size)

    def fill(self, x: Tensor, pending: Tensor | None = None) -> Tensor:
        """``[B, T, ...] -> [rows, segments, C, ...]``, empty slots zero; ``pending`` from :meth:`pending` before."""
        wide = x.new_zeros((len(self.count), self.segments * self.size, *x.shape[2:]))
        if pending is not None:
            wide[:, : self.size - 1] = pending.to(x.dtype)
        wide = wide.index_put((self.row, self.slot), x.flatten(0, 1))
        return wide.unflatten(1, (self.segments, self.size))

    def take(self, filled: Tensor) -> Tensor:
        """The slots of this call's tokens, ``[B, T, ...]``, of ``[rows, segments, C, ...]`` or of the slots ``used`` of it."""
        first = 0 if filled.shape[2] == self.size else self.used.start
        place = self.slot % self.size - first
        return filled[self.row, self.slot // self.size, place].unflatten(0, self.shape)

    def pending(self, filled: Tensor) -> Tensor:
        """The tokens of the unfinished segments, ``[rows, C - 1, ...]``, zero behind them."""
        place = (self.last * self.size)[:, None] + torch.arange(self.size - 1, device=filled.device)
        here = (place < self.end[:, None]).unflatten(1, (self.size - 1, *([1] * (filled.dim() - 3))))
        rows = torch.arange(len(self.count), device=filled.device)[:, None]
        found = filled.flatten(1, 2)[rows, place.clamp(max=self.segments * self.size - 1)]
        return torch.where(here, found, torch.zeros_like(found))
