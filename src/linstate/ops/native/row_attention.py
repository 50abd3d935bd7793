"""Native softmax attention of one token: every row looks at places of its own, wherever they lie.

``csrc/kernels/row_attention.cpp`` has the kernel. It reads keys and values once for all the heads that share them, adds up in float32 in an order
that depends on the row's own places alone, and writes the newest token where the caller wants it. Two callers:
:mod:`linstate.ops.softmax_attention.by_row`, whose rows have room after them, and the step on a cache that is one tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linstate.ops.dispatch import Call, register
from linstate.ops.native import lib
from linstate.ops.native.tensors import unfit
from linstate.ops.tensors import dense, plain
from linstate.ops.zeros import LEAST, untouched_zeros


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


def seeing(
    keys: Tensor, values: Tensor, places: int, *, first: tuple[int, int], to: tuple[int, int] | None = None
) -> lib.Row:
    """One row for :func:`attend`: of ``keys [S, Hk, K]`` and ``values [S, Hk, V]``, without gaps, it sees ``places``.

    Args:
        first: the first place seen of each. to: where the newest key and value are written, in the same memory.

    Raises:
        ArgumentError: the places are not in the tensors.
    """
    if to is None:
        return lib.Row(keys, first[0], values, first[1], places, None, 0, None, 0, 0)
    return lib.Row(keys, first[0], values, first[1], places, keys, to[0], values, to[1], 0)


def alone() -> lib.Row:
    """One row that sees only itself, and is written nowhere."""
    return lib.Row()


def attend(q: Tensor, k: Tensor, v: Tensor, rows: list[lib.Row], scale: float) -> Tensor:
    """The output ``[B, 1, Hq, V]`` for one token a row; what :func:`refuses` does not refuse.

    Args:
        q, k, v: as in :func:`linstate.ops.softmax_attention`, T = 1. rows: whose keys and values are in the dtype of k and v,
            in memory that the caller keeps until then.
    """
    o = torch.empty((*q.shape[:3], v.shape[3]), dtype=v.dtype)
    lib.attend_rows(dense(q), dense(k), dense(v), rows, scale, o, torch.get_num_threads())  # type: ignore[arg-type]
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
    rows, made = [], [t.unbind(0) for t in after]
    for b, (keys, values, length) in enumerate(zip(*before, lengths, strict=True)):
        seen = length if window is None else min(length, window - 1)
        first, to = past - seen, places - 1 - moved
        seen_by = (keys, first, values, first, seen)
        if places:
            rows.append(lib.Row(*seen_by, made[0][b], to, made[1][b], to, moved))
        else:
            rows.append(lib.Row(*seen_by, None, 0, None, 0, 0))
    o = attend(q, k, v, rows, scale)
    return o, (after[0], after[1], cache[2] + 1 if window is None else (cache[2] + 1).clamp(max=places))
