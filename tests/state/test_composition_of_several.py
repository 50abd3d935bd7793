"""Composition of several states: exact where the algebra says so, the same whatever the order, labelled."""

from __future__ import annotations

import itertools

import pytest
import torch

from linstate.engine.transitions import transitions
from linstate.errors import CompositionError, StateMismatchError
from linstate.state.composition import METHODS, Transition, compose_all
from small_models import TEXT, build

PARTS = (TEXT[:300], TEXT[300:520], TEXT[520:900])


def made(pattern):
    model = build(pattern)
    ids = [model.tokenizer.encode(part).ids for part in PARTS]
    states = [model.settle(model.append(one)) for one in ids]
    return model, ids, states


def off(one, two):
    names = [name for name in one.tensors if name.endswith(".S")]
    return max(float((one.tensors[n] - two.tensors[n]).norm() / two.tensors[n].norm()) for n in names)


def test_caso_is_exact_where_a_layer_sees_only_its_text():
    model, ids, states = made("delta")
    acts = [transitions(model, one) for one in ids]
    whole = model.settle(model.append([id for one in ids for id in one]))
    errors = {}
    for method in METHODS:
        errors[method] = off(compose_all(states, method, acts), whole)
    first = "layers.0.mixer.S"  # its inputs are embeddings and a short convolution
    composed = compose_all(states, "caso", acts).tensors[first]
    summed = compose_all(states, "sum").tensors[first]
    truth = whole.tensors[first]
    assert (
        float((composed - truth).norm() / truth.norm()) < 0.1 < float((summed - truth).norm() / truth.norm())
    )
    assert errors["caso"] < min(errors["sum"], errors["average"])


def test_sum_is_exact_without_decay():
    model, ids, states = made("sum")
    whole = model.settle(model.append([id for one in ids for id in one]))
    composed = compose_all(states, "sum")
    assert composed.composition == "exact" and off(composed, whole) < 1e-5
    assert compose_all(states, "average").composition == "approximate"


def test_picaso_is_the_mean_over_all_orders():
    model, ids, states = made("delta")
    acts = [transitions(model, one) for one in ids]
    composed = compose_all(states, "picaso", acts)
    orders = [
        compose_all([states[i] for i in order], "caso", [acts[i] for i in order])
        for order in itertools.permutations(range(3))
    ]
    assert off(orders[0], orders[1]) > 1e-3
    for name, tensor in composed.tensors.items():
        mean = torch.stack([one.tensors[name] for one in orders]).mean(0)
        torch.testing.assert_close(tensor, mean, rtol=1e-4, atol=1e-5)
    turned = compose_all(states[::-1], "picaso", acts[::-1])
    assert off(turned, composed) < 1e-5
    assert composed.composition == "approximate" and composed.notes["composed_by"] == "picaso"
    assert composed.position == sum(map(len, ids)) == composed.origin


@pytest.mark.parametrize("matrix", [True, False])
def test_transitions_by_hand(matrix):
    state, act = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 3 if matrix else 4)
    found = Transition(matrix, act).act(state)
    for h in range(2):
        for v in range(4):
            column = act[0, h] @ state[0, h, :, v] if matrix else act[0, h, :, v] * state[0, h, :, v]
            torch.testing.assert_close(found[0, h, :, v], column)


def test_a_composed_state_goes_on():
    model, _, states = made("rwkv")
    for method in ("sum", "average"):
        assert model.generate("x", compose_all(states, method), max_tokens=3).ids


def test_what_cannot_be_composed():
    model, ids, states = made("delta")
    with pytest.raises(CompositionError, match="needs the transition"):
        compose_all(states, "picaso")
    with pytest.raises(CompositionError, match="at most 8"):
        compose_all(states * 3, "picaso", [{}] * 9)
    with pytest.raises(CompositionError, match="must be one of"):
        compose_all(states, "mean")
    with pytest.raises(CompositionError, match="settle it first"):
        compose_all([states[0], model.append(ids[0])], "sum")
    with pytest.raises(CompositionError, match="no state"):
        compose_all([], "sum")
    with pytest.raises(StateMismatchError):
        compose_all([states[0], build("delta", seed=1).settle(build("delta", seed=1).append(ids[0]))], "sum")
    hybrid = build("hybrid")
    with pytest.raises(CompositionError, match="absolute positions"):
        compose_all([hybrid.settle(hybrid.append(ids[0]))] * 2, "sum")
    with pytest.raises(CompositionError, match="no transition"):
        transitions(hybrid, ids[0])
