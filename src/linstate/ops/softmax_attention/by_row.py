"""Caches of many conversations in one step: each row in memory of its own, as long as it is.

A batch of caches as one tensor costs a copy of all of them with every token, reads places that only the longest row uses, and
gives bits that depend on it. Here a row is a piece of a buffer with room behind it: a token is written into the room, and a row
looks at its own places alone, so a step costs what its rows have read, and what a row gets depends on no neighbour.

What was written never changes: a token goes into a buffer only behind the last one that is in it; whoever goes on from an earlier
end (a fork) gets a buffer of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from linstate.errors import ArgumentError
from linstate.ops.checks import check_lengths
from linstate.ops.native import row_attention
from linstate.ops.softmax_attention.torch_blocked import over
from linstate.ops.zeros import untouched_zeros

_ROOM = 64


class _Buffer:
    """``places [S, H, D]``, of which the first ``filled`` have been written. ``across``: in memory as ``[H, D, S]``."""

    __slots__ = ("across", "filled", "places", "size")

    def __init__(self, places: Tensor, filled: int, across: bool = False) -> None:
        self.places, self.filled, self.across = places, filled, across
        self.size = len(places)


class Row(NamedTuple):
    """Keys or values of one conversation: the places ``begin`` to ``end`` of a buffer."""

    buffer: _Buffer
    begin: int
    end: int

    def append(self, new: Tensor, across: bool = False) -> Row:
        """The row and then ``new [T, H, D]``.

        Args:
            across: hold it so that a sum over places reads memory in order: a product of few rows with values is half again as
                fast.
        """
        row = self.longer(len(new), new, across)
        row.buffer.places[row.end - len(new) : row.end] = new
        return row

    def longer(self, tokens: int, new: Tensor, across: bool = False) -> Row:
        """The row and then ``tokens`` places like those of ``new``, which the caller writes at once."""
        buffer, begin, end = self.buffer, self.begin, self.end
        if end != buffer.filled or end + tokens > buffer.size or across != buffer.across:
            used = end - begin
            room = -(-(used + tokens + max(_ROOM, used // 8)) // 16) * 16
            shape = (room, *new.shape[1:])
            places = new.new_empty((*shape[1:], room)).permute(2, 0, 1) if across else new.new_empty(shape)
            places[:used] = buffer.places[begin:end]
            buffer, begin, end = _Buffer(places, used, across), 0, used
        buffer.filled = end + tokens
        return Row(buffer, begin, end + tokens)

    def last(self, places: int | None) -> Row:
        """Its newest ``places``; None: all."""
        return self if places is None else Row(self.buffer, max(self.begin, self.end - places), self.end)

    @property
    def tensor(self) -> Tensor:
        """``[S, H, D]``: shares the buffer's memory."""
        return self.buffer.places[self.begin : self.end]


class Rows:
    """What stands in a state where a tensor ``[B, S, H, D]`` of keys or values would: B rows; None for one that nobody wants to
    know anything of (it fills a batch), and that sees only itself."""

    def __init__(self, rows: Iterable[Row | None]) -> None:
        self.rows = tuple(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: slice) -> Rows:
        return Rows(self.rows[rows])

    @staticmethod
    def of(cache: Tensor, length: Tensor) -> Rows:
        """The rows of ``cache [B, S, H, D]``, of which the last ``length [B]`` places count."""
        places = cache.shape[1]
        check_lengths("softmax_attention", length, places)
        return Rows(
            Row(_Buffer(row, places), places - used, places)
            for row, used in zip(cache, length.tolist(), strict=True)
        )

    def dense(self, places: int | None) -> Tensor:
        """As a tensor of memory of its own: ``[B, S, H, D]`` with S ``places`` (None: those of the longest row), zeros before."""
        rows = [row.tensor for row in self.rows if row is not None]
        most = max(len(row) for row in rows) if places is None else places
        found = untouched_zeros((len(rows), most, *rows[0].shape[1:]), rows[0])
        for into, row in zip(found, rows, strict=True):
            into[most - len(row) :] = row
        return found


def step(
    q: Tensor, k: Tensor, v: Tensor, cache: tuple[Rows, Rows, Tensor], window: int | None, scale: float
) -> tuple[Tensor, tuple[Rows, Rows, Tensor]]:
    """The next tokens of each row, from row to row: arguments as in :func:`linstate.ops.softmax_attention`, mostly T = 1."""
    if q.shape[1] != 1:
        return _several(q, k, v, cache, window, scale)
    held = next((row.buffer.places for row in cache[0].rows if row is not None), k)
    if row_attention.refuses({"q": q, "k": k, "v": v, "held": held}) is None:
        return _native(q, k, v, cache, window, scale)
    groups = q.shape[2] // k.shape[2]
    queries = q[:, 0].unflatten(1, (k.shape[2], groups))  # [B, Hk, groups, K]
    wide = q.dtype in (
        torch.float32,
        torch.float64,
    )  # narrower, scores would be rounded: torch's fused kernel adds up in float32
    o = v.repeat_interleave(groups, dim=2)  # [B, 1, Hq, V]: of a token that sees only itself
    keys, values = list(cache[0].rows), list(cache[1].rows)
    kept = None if window is None else window - 1
    for b, (key, value) in enumerate(zip(keys, values, strict=True)):
        if key is None or value is None:
            continue
        key, value = key.last(kept).append(k[b]), value.last(kept).append(v[b], across=wide)
        held, said = (x.tensor.transpose(0, 1) for x in (key, value))  # [Hk, S, K], [Hk, S, V]
        if wide:
            scores = torch.bmm(held, scale * queries[b].transpose(1, 2))  # [Hk, S, groups]
            found = torch.bmm(scores.transpose(1, 2).contiguous().softmax(-1), said)  # [Hk, groups, V]
        else:
            found = F.scaled_dot_product_attention(queries[b], held, said, scale=scale)
        o[b, 0] = found.flatten(0, 1)
        keys[b], values[b] = key.last(kept), value.last(kept)
    length = cache[2] + 1
    return o, (Rows(keys), Rows(values), length if kept is None else length.clamp(max=kept))


def _native(
    q: Tensor, k: Tensor, v: Tensor, cache: tuple[Rows, Rows, Tensor], window: int | None, scale: float
) -> tuple[Tensor, tuple[Rows, Rows, Tensor]]:
    """One token a row, all of them in one call, which also writes the newest keys and values into their rooms."""
    keys, values = list(cache[0].rows), list(cache[1].rows)
    kept, table = None if window is None else window - 1, []
    for b, (key, value) in enumerate(zip(keys, values, strict=True)):
        if key is None or value is None:
            table.append(row_attention.alone())
            continue
        key, value = key.last(kept).longer(1, k[b]), value.last(kept).longer(1, v[b])
        used = key.buffer.places, value.buffer.places, key.end - key.begin - 1
        table.append(
            row_attention.seeing(*used, first=(key.begin, value.begin), to=(key.end - 1, value.end - 1))
        )
        keys[b], values[b] = key.last(kept), value.last(kept)
    o = row_attention.attend(q, k, v, table, scale)
    length = cache[2] + 1
    return o, (Rows(keys), Rows(values), length if kept is None else length.clamp(max=kept))


def _several(
    q: Tensor, k: Tensor, v: Tensor, cache: tuple[Rows, Rows, Tensor], window: int | None, scale: float
) -> tuple[Tensor, tuple[Rows, Rows, Tensor]]:
    """T tokens: as blocks of a text are read, from the places in use."""
    keys, values = list(cache[0].rows), list(cache[1].rows)
    kept, outputs, none = None if window is None else window - 1, [], torch.zeros(1, dtype=torch.int64)
    for b, (key, value) in enumerate(zip(keys, values, strict=True)):
        if key is None or value is None:
            raise ArgumentError("softmax_attention: rows that only fill a batch take one token at a time")
        key, value = key.last(kept).append(k[b]), value.last(kept).append(v[b])
        seen = key.tensor[None], value.tensor[None]  # [1, S + T, Hk, *]
        outputs.append(over(q[b : b + 1], *seen, none, window, scale, True))
        keys[b], values[b] = key.last(kept), value.last(kept)
    length = cache[2] + q.shape[1]
    o = torch.cat(outputs)  # [B, T, Hq, V]
    return o, (Rows(keys), Rows(values), length if kept is None else length.clamp(max=kept))


def serves(device: torch.device) -> bool:
    """Whether rows one by one are the better way: where a call costs little beside the memory that it reads."""
    return device.type == "cpu"
