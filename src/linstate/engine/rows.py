"""States of conversations as rows of one call.

Keys and values stand in a state of many rows as :class:`linstate.ops.softmax_attention.by_row.Rows`: every row in memory of its
own, so that conversations of any length run together, and none is copied when another joins or leaves. All else is stacked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from linstate.models import Decoder
from linstate.ops.softmax_attention.by_row import Rows, serves
from linstate.types import LayerState


def caches(decoder: Decoder) -> Mapping[str, int | None]:
    """The tensors that are kept row by row, and how many places they have as tensors; none where static buffers or another device
    than the CPU want tensors."""
    return decoder.caches if decoder.step is None and serves(decoder.embedding.weight.device) else {}


def by_row(decoder: Decoder, tensors: LayerState) -> LayerState:
    """A state with its keys and values row by row. It stands for what it was, and no tensor of it is changed."""
    found = dict(tensors)
    for name in caches(decoder):
        if not isinstance(tensors[name], Rows):
            length = tensors[f"{name.rpartition('.')[0]}.length"]
            found[name] = cast(Tensor, Rows.of(tensors[name], length))
    return found


def dense(decoder: Decoder, tensors: LayerState, *, own: bool = False) -> LayerState:
    """The inverse of :func:`by_row`: tensors only; with ``own`` of memory that nothing else has."""
    return {
        name: t.dense(decoder.caches[name]) if isinstance(t, Rows) else t.clone() if own else t
        for name, t in tensors.items()
    }


def stacked(parts: Sequence[LayerState], size: int) -> LayerState:
    """States of one row each as one of ``size`` rows; copies of the first fill it, of what is kept row by row nothing does."""
    filled = [*parts, *[parts[0]] * (size - len(parts))]
    found: LayerState = {}
    for name, first in parts[0].items():
        if isinstance(first, Rows):
            rows = [row for part in parts for row in cast(Rows, part[name]).rows]
            found[name] = cast(Tensor, Rows([*rows, *[None] * (size - len(rows))]))
        else:
            found[name] = torch.cat([part[name] for part in filled])
    return found
