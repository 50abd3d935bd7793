"""Composition of states: what a model would keep of text A followed by text B, from the states of each.

A recurrence is affine in its state, so text B acts as ``S -> P_B S + H_B``, and ``H_B`` is the state of B read from
nothing. What a state does not hold is ``P_B``:

============================  =====================================================================================
mixers without a decay        ``P_B = I``: the sum is exact for the layer's inputs
decays, delta rule, dplr,     ``P_B`` would have faded or overwritten parts of A; the sum leaves A whole: approximate
elementwise scans
softmax attention, its cache  keys carry absolute positions: refused (a keyed window: joined, approximate)
running maximum (RWKV-4)      each state's sums are divided by a scale of its own: refused
inner models, fast weights    B would have trained them from where A left them; the sum of both ways: approximate
============================  =====================================================================================

The sum is ``Mixer.add``: states that are kept in units of a running maximum (mLSTM, Performer) are brought to one unit
first. Short memories of the newest tokens (convolution tails, token shifts) are B's. In a model of more than one layer the
inputs of the later layers of B depend on A too, so there every composition is approximate. For an exact result read
B's text from A's state.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from linstate import mixers
from linstate.errors import CompositionError, StateMismatchError
from linstate.models.config import NONE
from linstate.models.fingerprint import Fingerprint
from linstate.models.in_place_ttt import FAST
from linstate.types import LayerState, prefixed, under


class Composable(Protocol):
    """A :class:`linstate.state.state.State`, as composition reads it."""

    @property
    def id(self) -> str: ...
    @property
    def model(self) -> Fingerprint: ...
    @property
    def tensors(self) -> LayerState: ...
    @property
    def layers(self) -> tuple[str, ...]: ...
    @property
    def position(self) -> int: ...
    @property
    def tail(self) -> tuple[int, ...]: ...
    @property
    def chain(self) -> str: ...
    @property
    def lineage(self) -> tuple[str, ...]: ...
    @property
    def precision_error(self) -> float: ...


S = TypeVar("S", bound=Composable)


def compose(first: S, later: S) -> S:
    """``first`` followed by ``later``; ``composition`` of the result says "exact" or "approximate".

    Raises:
        StateMismatchError: the states belong to different models.
        CompositionError: a layer's state cannot be composed, or ``first`` still has unread tokens in its tail
            (``LanguageModel.settle`` reads them).
    """
    if differ := first.model.differences(later.model):
        raise StateMismatchError(
            f"states of different models cannot be composed: their {' and '.join(differ)} differ"
        )
    if first.tail:
        raise CompositionError(
            f"the first state has {len(first.tail)} tokens that hang over its grid; settle it first (LanguageModel.settle)"
        )
    exact = len(first.layers) == 1
    tensors: LayerState = dict(later.tensors)  # feed-forwards: short memories of the newest token
    for layer, name in enumerate(first.layers):
        if name == NONE:
            continue
        kind, place = mixers.find(name), f"layers.{layer}.mixer"
        if kind.composition == "refused":
            raise CompositionError(
                f"layer {layer} ({name}) keeps keys at absolute positions, or sums or segments of its own text, and cannot be "
                "composed; read the second text from the first state instead"
            )
        exact = exact and kind.composition == "exact"
        tensors |= prefixed(place, kind.add(under(place, first.tensors), under(place, later.tensors)))
    grid_position = first.position + later.position - len(later.tail)
    fast = {n: t + later.tensors[n] for n, t in first.tensors.items() if n.split(".")[-1] == FAST}
    composed: Any = replace(
        first,  # type: ignore[type-var]
        tensors=tensors | fast,
        origin=grid_position,
        position=grid_position + len(later.tail),
        tail=later.tail,
        calls=(),
        chain=hashlib.sha256(bytes.fromhex(first.chain) + bytes.fromhex(later.chain)).hexdigest(),
        tokens=None,
        lineage=(*first.lineage, first.id, later.id),
        composition="exact" if exact and not fast else "approximate",
        precision_error=max(first.precision_error, later.precision_error),
    )
    return composed
