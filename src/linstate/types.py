"""Dimension letters and the few types that every room shares.

====  ===========================================================================
 B    batch: rows of a batch, or sequences of a packed call
 T    time: tokens
 H    heads (``Hk`` heads of q and k, ``Hv`` heads of v; ``Hv`` a multiple of ``Hk``)
 K    key size of a head
 V    value size of a head
 N    state size of a scan, or the number of chunks where a line says so
 C    chunk: tokens that are worked on at once
 D    model width, or channels
 W    width of a convolution or of an attention window
====  ===========================================================================

A sequence tensor is ``[B, T, H, D]``; a matrix state is ``[B, H, K, V]`` and float32 (float64 for
float64 inputs). A layer's state is a flat mapping of named tensors, each with B in front.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

LayerState = dict[str, Tensor]
"""State of one layer or of a whole model: name -> tensor, batch first."""

StateLike = Mapping[str, Tensor]

Range = tuple[int, int | str]
"""Smallest and largest value of an integer tensor of a state; a name stands for the places (axis 1) of that tensor beside it."""

MOST_TOKENS = 2**53
"""Tokens that a state can have read: positions stay exact as float64."""


def state_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype in which a state is kept for these inputs: float64 for float64 inputs, else float32."""
    return (
        torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
    )


def under(prefix: str, state: StateLike) -> LayerState:
    """The part of ``state`` whose names begin with ``prefix.``, without the prefix."""
    cut = len(prefix) + 1
    return {name[cut:]: tensor for name, tensor in state.items() if name.startswith(prefix + ".")}


def by_layer(state: StateLike) -> dict[int, LayerState]:
    """A model's state ``layers.<i>.<name> -> tensor`` as a mapping of each layer's own."""
    layers: dict[int, LayerState] = {}
    for name, tensor in state.items():
        _, layer, rest = name.split(".", 2)
        layers.setdefault(int(layer), {})[rest] = tensor
    return layers


def prefixed(prefix: str, state: StateLike) -> LayerState:
    """``state`` with ``prefix.`` before every name."""
    return {f"{prefix}.{name}": tensor for name, tensor in state.items()}


def state_bytes(state: StateLike) -> int:
    """Bytes that the tensors of ``state`` hold."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())
