"""What a segment of text does to a state, ``S -> P S + H``: summarise, apply and compose.

Every recurrence of the matrix-state family is affine in its state, so a whole segment is one affine map,
and the maps compose: ``(P2, H2) o (P1, H1) = (P2 P1, P2 H1 + H2)``. Chunked prefill, context parallelism
and composition of saved states are this fact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from linstate.errors import ArgumentError
from linstate.types import state_dtype


@dataclass(frozen=True)
class Segment:
    """The affine map of a segment.

    Attributes:
        transition: P. ``[B, H, K, K]`` (a matrix) when ``dense``, else elementwise factors,
            broadcastable to ``[B, H, K, V]``.
        increment: H, the state after the segment from an empty one, ``[B, H, K, V]``.
    """

    transition: Tensor
    increment: Tensor
    dense: bool

    def _move(self, state: Tensor) -> Tensor:
        return self.transition @ state if self.dense else self.transition * state

    def apply(self, state: Tensor) -> Tensor:
        """The state after the segment, from ``state [B, H, K, V]`` before it."""
        return self._move(state) + self.increment

    def then(self, later: Segment) -> Segment:
        """This segment followed by ``later``. Raises ArgumentError when they are of different recurrences."""
        if self.dense != later.dense:
            raise ArgumentError("Segment.then: the segments come from different recurrences")
        return Segment(later._move(self.transition), later.apply(self.increment), self.dense)


def summarise(
    op: Callable[..., tuple[Tensor, Tensor]], q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any
) -> Segment:
    """The affine map of a segment under ``op``: ``summarise(delta_rule, q, k, v, beta, g)``.

    P is what the op makes of the identity when nothing is written, H what it makes of an empty state; so
    every form and backend of every recurrence summarises without code of its own. Takes the op's arguments,
    but no ``initial_state``. For ops with grouped heads P has the value heads.

    Raises:
        ArgumentError: for an op that is not affine in a matrix state (softmax attention), or with an initial state.
    """
    kind = getattr(op, "transition", None)
    if kind not in ("dense", "elementwise"):
        raise ArgumentError(f"summarise: {getattr(op, '__name__', op)} has no affine state")
    if kwargs.get("initial_state") is not None:
        raise ArgumentError("summarise: a summary holds for every initial state; give none")
    batch = kwargs["cu_seqlens"].numel() - 1 if kwargs.get("cu_seqlens") is not None else v.shape[0]
    heads, key = v.shape[2], 1 if k is None else k.shape[-1]
    dtype = state_dtype(q, k, v)
    if kind == "dense":
        nothing = v.new_zeros((*v.shape[:3], key))
        start = torch.eye(key, dtype=dtype, device=v.device).expand(batch, heads, key, key)
    else:
        nothing = torch.zeros_like(v)
        start = torch.ones((batch, heads, key, v.shape[-1]), dtype=dtype, device=v.device)
    _, transition = op(q, k, nothing, *args, **{**kwargs, "initial_state": start})
    _, increment = op(q, k, v, *args, **kwargs)
    return Segment(transition, increment, kind == "dense")
