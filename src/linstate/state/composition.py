"""Several states into one, whatever their order, without reading any text again.

:func:`linstate.state.compose.compose` puts one state behind another. Here are as many as one likes, of texts that know nothing
of each other (search results):

==========  ==========================================================================================================
sum         ``S_1 + ... + S_n``. Exact for the inputs of a layer without decay; else no text fades for the others
average     ``(S_1 + ... + S_n) / n``: the size of numbers that the model knows; each text counts 1/n
caso        ``P_n (... P_2 S_1 + S_2 ...) + S_n``: in this order, each text fading or overwriting what was before it, as reading
            would (Liu et al. 2025, PICASO, arXiv 2502.17605, section 4.1). Exact for the inputs of the layers
picaso      the mean of ``caso`` over all n! orders: no text is the last one (there, section 4.3)
==========  ==========================================================================================================

``P_i`` is what text i does to whatever was there before it, its **transition** (:func:`linstate.engine.transitions`), which the
last two need beside the states. The mean over all orders needs no n! sums: with ``f(U)`` that mean over a set U of texts,
``f(U) = mean over i in U of (P_i f(U - i) + S_i)``, since each i is last in 1/|U| of the orders. That is n 2^(n-1) products, and
unlike the paper's symmetric polynomials it does not ask that transitions commute, which those of the delta rule do not.

Short memories of the newest tokens (convolution tails, token shifts) are those of the last text in ``sum`` and ``caso``, and
their mean in the other two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from linstate import mixers
from linstate.errors import CompositionError, StateMismatchError
from linstate.models.config import NONE
from linstate.models.in_place_ttt import FAST
from linstate.state.state import State, now
from linstate.types import LayerState, prefixed, under


class Transition(NamedTuple):
    """What a text does to one state tensor ``S [1, H, K, V]`` of before: ``P S`` for a matrix ``P [1, H, K, K]``, else ``P * S``."""

    matrix: bool
    map: Tensor

    def act(self, state: Tensor) -> Tensor:
        """What becomes of a state."""
        return self.map @ state if self.matrix else self.map * state


Transitions = dict[str, Transition]
"""Of a text: by the name of the state's tensor."""

Method = Literal["sum", "average", "caso", "picaso"]
METHODS: tuple[Method, ...] = ("sum", "average", "caso", "picaso")
_MOST = 8  # states of which the mean over all orders is made


def compose_all(
    states: Sequence[State], method: Method, transitions: Sequence[Transitions] | None = None
) -> State:
    """One state of several, in the order given where the method has one; ``composition`` says "exact" or "approximate".

    Args:
        transitions: of each state's text, for "caso" and "picaso".

    Raises:
        StateMismatchError: the states belong to different models.
        CompositionError: a layer's state cannot be composed, a state has unread tokens in its tail
            (``LanguageModel.settle`` reads them), transitions are missing, or there are too many states for "picaso".
    """
    _check(states, method, transitions)
    first = states[0]
    position = sum(state.position for state in states)
    digest = hashlib.sha256(method.encode())
    for state in states:
        digest.update(bytes.fromhex(state.chain))
    exact = len(first.layers) == 1 and (
        method == "caso" or (method == "sum" and mixers.find(first.layers[0]).composition == "exact")
    )
    return replace(
        first,
        tensors=_composed(states, method, transitions or ()),
        origin=position,
        position=position,
        tail=(),
        calls=(),
        chain=digest.hexdigest(),
        tokens=None,
        created=now(),
        lineage=tuple(state.id for state in states),
        composition="exact" if exact else "approximate",
        precision_error=max(state.precision_error for state in states),
        notes={**first.notes, "composed_by": method},
    )


def _composed(states: Sequence[State], method: Method, transitions: Sequence[Transitions]) -> LayerState:
    added, last, made = _added(states), states[-1].tensors, LayerState()
    for name, total in added.items():
        each = [state.tensors[name] for state in states]
        if total is last[name]:  # a short memory, which does not add up
            made[name] = total if method in ("sum", "caso") else _mean(each)
        elif method == "sum":
            made[name] = total
        elif method == "average":
            made[name] = total / len(states)
        elif method == "caso":
            made[name] = _in_order(each, [one[name] for one in transitions])
        else:
            made[name] = _in_any_order(each, [one[name] for one in transitions])
    return made


def _check(states: Sequence[State], method: Method, transitions: Sequence[Transitions] | None) -> None:
    if method not in METHODS:
        raise CompositionError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if not states:
        raise CompositionError("there is no state to compose")
    first = states[0]
    for state in states:
        if differ := first.model.differences(state.model):
            raise StateMismatchError(
                f"states of different models cannot be composed: their {' and '.join(differ)} differ"
            )
        if state.tail:
            raise CompositionError(
                f"a state has {len(state.tail)} tokens that hang over its grid; settle it first (LanguageModel.settle)"
            )
    for layer, name in _mixing(first):
        if mixers.find(name).composition == "refused":
            raise CompositionError(
                f"layer {layer} ({name}) keeps keys at absolute positions, or sums or segments of its own text, and cannot be "
                "composed; read the texts one behind the other instead"
            )
    if method in ("caso", "picaso"):
        if transitions is None or len(transitions) != len(states):
            raise CompositionError(
                f"{method} needs the transition of each of the {len(states)} texts (linstate.engine.transitions); sum and "
                "average do without"
            )
        if method == "picaso" and len(states) > _MOST:
            raise CompositionError(f"picaso composes at most {_MOST} states, got {len(states)}")


def _mixing(state: State) -> list[tuple[int, str]]:
    """Number and mixer of the layers that have one."""
    return [(layer, name) for layer, name in enumerate(state.layers) if name != NONE]


def _added(states: Sequence[State]) -> LayerState:
    """The sum by each mixer's own addition; what does not add up is the last state's tensor itself."""

    def add(first: LayerState, later: LayerState) -> LayerState:
        total = dict(later)
        for layer, name in _mixing(states[0]):
            place = f"layers.{layer}.mixer"
            total |= prefixed(place, mixers.find(name).add(under(place, first), under(place, later)))
        return total | {n: t + later[n] for n, t in first.items() if n.split(".")[-1] == FAST}

    return reduce(add, (state.tensors for state in states))


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    if not tensors[0].is_floating_point():
        return tensors[-1]
    return torch.stack(list(tensors)).mean(0)


def _in_order(states: Sequence[Tensor], transitions: Sequence[Transition]) -> Tensor:
    made = states[0]
    for state, transition in zip(states[1:], transitions[1:], strict=True):
        made = transition.act(made) + state
    return made


def _in_any_order(states: Sequence[Tensor], transitions: Sequence[Transition]) -> Tensor:
    """The mean over all orders, by sets: bit i of a set's number says whether text i is in it."""
    means = {0: torch.zeros_like(states[0])}
    for members in range(1, 1 << len(states)):
        inside = [i for i in range(len(states)) if members >> i & 1]
        means[members] = sum(
            (transitions[i].act(means[members & ~(1 << i)]) + states[i] for i in inside),
            torch.zeros_like(states[0]),
        ) / len(inside)
    return means[(1 << len(states)) - 1]
