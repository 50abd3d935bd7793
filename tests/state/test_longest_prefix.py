"""The longest stored beginning of a text: exact, and a miss says why."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from linstate.engine import Checkpointer
from linstate.models.fingerprint import Fingerprint
from linstate.state.state import chain
from linstate.state.store import Checkpoints, StateStore, model_key
from linstate.state.store.prefix import chains
from small_models import TEXT, build
from tiny_states import GRID, MODEL, tiny


@pytest.fixture
def store(tmp_path):
    return StateStore(tmp_path)


def longest(store, ids, **more):
    return store.longest_prefix(ids, **{"model": MODEL, "grid": GRID, **more})


def test_against_brute_force(store):
    rng = random.Random(3)
    texts = []
    for _ in range(80):  # a tree of texts: each goes on from a beginning of another
        base = rng.choice(texts)[: rng.randrange(40)] if texts and rng.random() < 0.8 else []
        texts.append(base + [rng.randrange(3) for _ in range(rng.randrange(1, 14))])
        store.put(tiny(texts[-1]))
    for block in {tuple(text[: GRID * n]) for text in texts[:15] for n in range(1, len(text) // GRID + 1)}:
        store.checkpoint(tiny(block, on_grid=True))
        texts.append([*block, None])  # serves only texts that are longer
    hits = 0
    for _ in range(300):
        asked = [x for x in rng.choice(texts) if x is not None][: rng.randrange(1, 60)]
        asked += [rng.randrange(3) for _ in range(rng.randrange(3))]
        expected = 0
        for text in texts:
            on_grid = text[-1] is None
            read = text[:-1] if on_grid else text
            if asked[: len(read)] == read and not (on_grid and len(read) == len(asked)):
                expected = max(expected, len(read))
        found = longest(store, asked)
        assert found.length == expected and (found.handle is None) == (expected == 0)
        hits += expected > 0
    assert hits > 100


def test_a_hit_is_bit_identical_to_a_miss(store):
    model = build("delta")
    ids = model.tokenizer.encode(TEXT).ids
    answer = model.generate("", model.append(ids[:300]), max_tokens=30)
    store.put(answer.state)  # a turn's end: its tail was generated, call by call
    asked = [*ids[:300], *answer.ids, *ids[300:]]
    found = store.longest_prefix(asked, model=model.fingerprint, grid=model.grid)
    assert found.length == 300 + len(answer.ids)
    back = store.load(found.handle.id, model=model.fingerprint, replay=False)
    one, two = model.append(asked[found.length :], back), model.append(asked)
    assert one.id == two.id and one.position == len(asked)
    assert all(torch.equal(one.tensors[name], t) for name, t in two.tensors.items())


def test_checkpoints_while_reading(store):
    model = build("delta")  # grid 16
    ids = model.tokenizer.encode(TEXT * 2).ids[:1200]
    keep = Checkpointer(store, policy=Checkpoints(first=64))
    reader = model.reader(on_block=keep)
    reader.feed(ids)
    assert [h.position for h in keep.kept] == [64, 128, 256, 512, 1024]
    assert {h.kind for h in keep.kept} == {"checkpoint"} and keep.kept[0].expires is not None
    again = Checkpointer(store, policy=Checkpoints(first=64))
    model.reader(on_block=again).feed(ids)
    assert [h.id for h in again.kept] == [h.id for h in keep.kept]  # not stored twice
    edited = [*ids[:700], 1, *ids[701:]]
    found = store.longest_prefix(edited, model=model.fingerprint, grid=16)
    assert found.length == 512
    reader = model.reader(store.load(found.handle.id))
    reader.feed(edited[512:])
    assert reader.state().id == model.append(edited).id


def test_a_caller_may_mark_any_block(store):
    model = build("delta")
    keep = Checkpointer(store)
    reader = model.reader(on_block=keep)
    reader.feed(model.tokenizer.encode(TEXT).ids[:100])
    assert keep.kept == [] and keep.mark(reader).position == 96


def test_a_miss_says_why(store):
    assert longest(store, range(9)).reason == "nothing is stored"
    store.put(tiny(range(30), model=Fingerprint("other", "w", "t")))
    assert longest(store, range(9)).reason == "no state of this model is stored, only of others"
    store.put(tiny(range(30)))
    assert "beginning of this text" in longest(store, range(9)).reason  # what is stored is longer
    found = longest(store, [*range(29), 5, 6])
    assert found.handle is None and "share the first 28 tokens" in found.reason
    store.checkpoint(tiny(range(8), on_grid=True))
    found = longest(store, [*range(29), 5, 6])
    assert found.length == 8 and "share the first 28 tokens, but go on differently" in found.reason
    assert longest(store, range(30)).reason == "the whole text was read before"
    found = longest(store, range(33))
    assert found.length == 30 and found.reason.startswith("3 tokens are new")
    assert longest(store, []).handle is None
    stats = store.stats()["prefix"]
    assert stats == {"hits": 3, "misses": 5, "tokens": 8 + 30 + 30}


def test_only_functions_of_the_ids_are_found(store):
    state = tiny(range(9))
    for other in (
        replace(state, origin=4, position=13),  # settled: the grid began elsewhere
        replace(state, composition="approximate"),
        replace(state, precision="bf16", precision_error=1e-3),
    ):
        store.put(other)
    assert longest(store, range(12)).handle is None
    store.put(state)
    assert longest(store, range(12)).length == 9


def test_what_expired_is_not_found(store):
    handle = store.put(tiny(range(9)))
    assert longest(store, range(12)).length == 9
    store.update(handle.id, ttl=1e-9)
    assert longest(store, range(12)).handle is None


def test_a_checkpoint_lives_as_long_as_the_longest_wish(store):
    first = store.checkpoint(tiny(range(8), on_grid=True), ttl=10)
    assert store.checkpoint(tiny(range(8), on_grid=True), ttl=1).expires == first.expires
    assert store.checkpoint(tiny(range(8), on_grid=True), ttl=99).expires > first.expires + 80
    assert store.checkpoint(tiny(range(8), on_grid=True)).expires is None
    assert store.usage()["states"] == 1


def test_chains_are_those_of_reading():
    ids, link = list(range(1000, 1016)), "00" * 32
    expected = [link]
    for at in range(0, 16, 4):
        link = chain(link, ids[at : at + 4])
        expected.append(link)
    assert list(chains(ids, 4)) == expected
    assert len(model_key(MODEL)) == 32
