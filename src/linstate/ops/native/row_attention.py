"""Native softmax attention of one token: every row looks at places of its own, wherever they lie.

``csrc/row_attention.cpp`` has the kernel. It reads keys and values once for all the heads that share them, adds up in float32 in an order
that depends on the row's own places alone, and writes the newest token where the caller wants it. Two callers:
:mod:`linstate.ops.softmax_attention.by_row`, whose rows have room behind them, and the step on a cache that is one tensor.
"""

from __future__ import annotations

from array import array
from typing import NamedTuple

import torch
from torch import Tensor

from linstate.ops.dispatch import Call, register
from linstate.ops.native.tensors import place, unfit
from linstate.ops.tensors import dense, plain
from linstate.ops.zeros import LEAST, untouched_zeros


class Row(NamedTuple):
    """Addresses of one row: ``places`` keys and values before the newest token; where that one is written, behind ``moved`` of
    the places. Zeros: it sees only itself."""

    keys: int = 0
    values: int = 0
    places: int = 0
    to_keys: int = 0
    to_values: int = 0
    moved: int = 0


NOBODY = Row()


def refuses(call: Call) -> str | None:
    """Why the kernel does not take a call, or None."""
    tensors = [t for t in call.values() if isinstance(t, Tensor)]
    if (why := unfit(call)) is not None:
        return why
    if not plain(*tensors)[0]:
        return "a gradient, torch.compile or a tensor of another kind is asked for"
    if len({t.dtype for t in tensors}) != 1:
        return "the tensors and the cache are not all of one dtype"
    for name in ("cache_k", "cache_v"):
        if name in call and (t := call[name]).stride()[1:] != (t.shape[2] * t.shape[3], t.shape[3], 1):
            return f"{name} is not without gaps"
    return None


def attend(q: Tensor, k: Tensor, v: Tensor, rows: list[Row], scale: float) -> Tensor:
    """The output ``[B, 1, Hq, V]`` for one token a row; what :func:`refuses` does not refuse.

    Args:
        q, k, v: as in :func:`linstate.ops.softmax_attention`, T = 1. rows: whose keys and values are without gaps
            (``[S, Hk, K]``, ``[S, Hk, V]``), in the dtype of k and v.
    """
    import linstate._native as _native

    batch, _, hk, key = k.shape
    hq, value = q.shape[2], v.shape[3]
    o = torch.empty((batch, 1, hq, value), dtype=v.dtype)
    q, k, v = dense(q), dense(k), dense(v)  # type: ignore[assignment]
    table = array("q", [number for row in rows for number in row])
    _native.attend_rows(
        (batch, hq, hk, key, value),
        (place(q), place(k), place(v)),
        (hk * key, key, hk * value, value),
        k.dtype is torch.bfloat16,
        scale,
        table.buffer_info()[0],
        max((row.places for row in rows), default=0),
        place(o),
        torch.get_num_threads(),
    )
    return o


@register("softmax_attention", "step", "native", refuses=refuses)
def step(
    q: Tensor, k: Tensor, v: Tensor, cache: tuple[Tensor, Tensor, Tensor], window: int | None, scale: float
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """See the module; arguments as in :func:`linstate.ops.softmax_attention`."""
    before, past = cache[:2], cache[0].shape[1]
    places = past + 1 if window is None else window - 1  # of the cache after
    lengths = cache[2].tolist()
    moved = max(0, min(past, places - 1))
    if (places - 1 - min(moved, max(lengths, default=0))) * before[0][:, :1].nbytes >= LEAST:
        moved = min(moved, max(lengths, default=0))  # what no row uses yet is zeros, and stays where it is
    shapes = [(len(t), places, *t.shape[2:]) for t in before]
    if moved == places - 1:  # all is written
        after = [t.new_empty(shape) for t, shape in zip(before, shapes, strict=True)]
    else:
        after = [untouched_zeros(shape, t) for t, shape in zip(before, shapes, strict=True)]
    rows = []
    for b, length in enumerate(lengths):
        seen = length if window is None else min(length, window - 1)
        start = [
            t.data_ptr() + t.element_size() * (b * t.stride(0) + (past - seen) * t.stride(1)) for t in before
        ]
        to = [
            t.data_ptr() + t[:1, : places - 1 - moved].nbytes + b * t[:1].nbytes if places else 0
            for t in after
        ]
        rows.append(Row(start[0], start[1], seen, to[0], to[1], moved))
    o = attend(q, k, v, rows, scale)
    return o, (after[0], after[1], cache[2] + 1 if window is None else (cache[2] + 1).clamp(max=places))
