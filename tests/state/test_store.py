"""The store of states: what comes back, what is shared, what is refused."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from linstate.errors import (
    ArgumentError,
    InputError,
    QuotaError,
    StateError,
    StateFileError,
    StateMismatchError,
    StateNotFoundError,
)
from linstate.models.fingerprint import Fingerprint
from linstate.state.store import StateStore, model_key
from small_models import TEXT, build
from tiny_states import MODEL, tiny


@pytest.fixture
def store(tmp_path):
    return StateStore(tmp_path / "library")


def objects(store):
    return sum(1 for _ in store.objects.list())


def test_restored_is_uninterrupted_through_another_process(tmp_path, store):
    model = build("delta")
    state = model.generate(
        "", model.read(TEXT), max_tokens=5
    ).state  # in the middle of a generation: calls are kept
    assert state.calls
    handle = store.put(state, name="talk")
    expected = model.generate("", state, max_tokens=20).ids
    program = (
        "import sys; from small_models import build; from linstate.state.store import StateStore\n"
        f"m = build('delta'); s = StateStore({str(tmp_path / 'library')!r}).load('talk', model=m.fingerprint)\n"
        "print(s.id, *m.generate('', s, max_tokens=20).ids)"
    )
    paths = [str(Path(__file__).resolve().parent.parent), *(path for path in sys.path if path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    out = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert out.stdout.split() == [state.id, *map(str, expected)]
    assert handle.position == state.position and handle.model == model_key(model.fingerprint)


def test_everything_comes_back(store):
    state = replace(
        tiny(range(10)),
        notes={"title": "ü"},
        lineage=("a", "b"),
        calls=(1, 1),
        created="2020-01-01T00:00:00+00:00",
    )
    handle = store.put(state, tags={"about": "x"}, ids=range(10))
    for back in (store.load(handle.id), StateStore(store.where, memory_bytes=0).load(handle.id)):
        for field in (
            "model",
            "model_name",
            "layers",
            "grid",
            "origin",
            "position",
            "tail",
            "calls",
            "chain",
            "created",
        ):
            assert getattr(back, field) == getattr(state, field), field
        assert back.lineage == state.lineage and back.notes == state.notes and back.id == state.id
        assert back.tokens == tuple(range(10)) == store.ids(handle.id)
    assert store.load(handle.id, replay=False).calls == ()
    assert store.load(handle.id, tokens=False).tokens is None
    assert handle.tags == {"about": "x"} and handle.ids_kept


def test_a_fork_costs_a_row(store):
    first = store.put(tiny(range(10)), name="a", tags={"k": "v"})
    forks = [store.fork("a", name=f"b{n}") for n in range(5)]
    assert objects(store) == 1 and store.usage()["bytes"] == first.stored_bytes
    assert {fork.parent for fork in forks} == {first.id} and forks[0].tags == {"k": "v"}
    store.delete("a")
    store.gc()
    assert store.load("b3").id == tiny(range(10)).id


def test_the_same_tensors_are_stored_once(store):
    a, b = tiny(range(9)), tiny([*range(9), 77])  # both have read two blocks; different tails
    handles = [store.put(a), store.put(a), store.put(b)]
    assert objects(store) == 1 and len({h.id for h in handles}) == 3
    assert store.load(handles[2].id).tail == (8, 77)
    store.put(tiny(range(13)))
    assert objects(store) == 2


def test_collection_goes_by_reachability(store):
    kept, gone = store.put(tiny(range(9))), store.put(tiny(range(20)), ids=range(20))
    again = store.fork(gone.id)
    store.delete(gone.id)
    assert objects(store) == 3  # the fork needs them
    store.delete(again.id)
    assert objects(store) == 1  # at once: nobody has to collect so that a quota is kept
    store.objects.write("ab" * 32, b"of a put that was killed")
    found = store.gc()
    assert (found.states, found.objects, found.bytes) == (0, 1, 24)
    assert store.load(kept.id).position == 9
    assert store.gc().objects == 0


def test_expiry(store):
    store.put(tiny(range(9)), name="soon", ttl=0.05)
    store.put(tiny(range(20)), name="later", ttl=1000)
    time.sleep(0.06)
    with pytest.raises(StateNotFoundError):
        store.load("soon")
    assert [h.name for h in store.list()] == ["later"]
    store.put(tiny(range(9)), name="soon")  # the name is free again
    assert store.gc().states == 1
    assert store.update("later", ttl=None).expires is None
    with pytest.raises(ArgumentError, match="above 0"):
        store.update("later", ttl=-1)


def test_names(store):
    first = store.put(tiny(range(9)), name="talk")
    with pytest.raises(StateError, match="'talk' already"):
        store.put(tiny(range(10)), name="talk")
    second = store.put(tiny(range(10)), name="talk", move=True, parent="talk")
    assert store.get("talk").id == second.id and second.parent == first.id
    assert store.get(first.id).name is None
    assert store.update(first.id, name="old").name == "old"
    with pytest.raises(StateError, match="already"):
        store.update(first.id, name="talk")
    assert store.get(first.id[:8]).id == first.id
    for bad in ("", " x", "a\nb", "x" * 201):
        with pytest.raises(ArgumentError, match="printable"):
            store.put(tiny(range(9)), name=bad)


def test_tenants_do_not_see_each_other(store):
    mine = store.put(tiny(range(9)), tenant="me", name="secret")
    for ref in (mine.id, "secret", mine.id[:10]):
        for act in (store.get, store.load, store.fork, store.delete, store.ids):
            with pytest.raises(StateNotFoundError):
                act(ref, tenant="you")
    assert list(store.list(tenant="you")) == []
    assert store.longest_prefix(range(12), tenant="you", model=MODEL, grid=4).handle is None
    with pytest.raises(StateNotFoundError):
        store.put(tiny(range(9)), tenant="you", parent=mine.id)
    yours = store.put(tiny(range(9)), tenant="you", name="secret")
    assert yours.id != mine.id and objects(store) == 1  # bytes are shared, and nobody can tell
    assert store.usage("you")["bytes"] == store.usage("me")["bytes"] > 0


def test_quotas(store):
    size = store.put(tiny(range(9)), tenant="t").stored_bytes
    store.set_quota("t", max_states=3, max_bytes=2 * size)
    store.put(tiny(range(20)), tenant="t")
    with pytest.raises(QuotaError, match=r"'t'.*bytes"):
        store.put(tiny(range(30)), tenant="t")
    assert objects(store) == 2  # refused before anything was written
    store.put(tiny(range(9)), tenant="t", name="third")  # costs no bytes
    with pytest.raises(QuotaError, match="3 states"):
        store.fork("third", tenant="t")
    store.update("third", tenant="t", ttl=0.01)
    time.sleep(0.02)
    store.fork(next(store.list(tenant="t")).id, tenant="t")  # what expired makes room
    store.put(tiny(range(30)), tenant="other")
    with pytest.raises(QuotaError):
        StateStore(store.where, max_states=1).fork(store.put(tiny(range(9)), tenant="new").id, tenant="new")


def test_listing(store):
    for n in range(6):
        store.put(tiny(range(5 + n)), tags={"n": str(n % 2), 'odd "name"': "x"})
    other = Fingerprint("other", "w", "t")
    store.put(tiny(range(5), model=other))
    store.checkpoint(tiny(range(4), on_grid=True))
    found = list(store.list(model=model_key(MODEL)))
    assert [h.position for h in found] == [10, 9, 8, 7, 6, 5]
    assert [h.position for h in store.list(tags={"n": "1", 'odd "name"': "x"})] == [10, 8, 6]
    assert [h.position for h in store.list(model=model_key(MODEL), limit=2, before=found[1].created)] == [
        8,
        7,
    ]
    assert [h.kind for h in store.list(kind="checkpoint")] == ["checkpoint"]
    assert len(list(store.list(kind=None, tenant=None))) == 8


def test_another_model_is_refused(store):
    store.put(tiny(range(9)), name="x")
    with pytest.raises(StateMismatchError, match="whose weights differ"):
        store.load("x", model=replace(MODEL, weights="others"))


def test_reduced_precision(store):
    state = tiny(range(9))
    handle = store.put(state, precision="int8")
    back = store.load(handle.id)
    assert back.precision == "int8" and 0 < back.precision_error < 0.02
    assert not torch.equal(back.tensors["layers.0.mixer.S"], state.tensors["layers.0.mixer.S"])
    assert store.longest_prefix(range(9), model=MODEL, grid=4).handle is None  # not bit-identical: no hit


def test_what_is_not_worth_keeping_is_refused(store):
    bad = replace(tiny(range(9)), tensors={"x": torch.tensor([[float("nan")]])})
    with pytest.raises(ArgumentError, match="NaN or Inf"):
        store.put(bad)
    with pytest.raises(ArgumentError, match="expected all 9 token ids"):
        store.put(tiny(range(9)), ids=range(8))
    with pytest.raises(ArgumentError, match="tags"):
        store.put(tiny(range(9)), tags={"n": 1})


def test_damage_is_found_and_named(store):
    good, bad, lost = (store.put(tiny(range(n))) for n in (9, 20, 30))
    path = next(p for p in Path(store.where).rglob(bad.digest))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    next(p for p in Path(store.where).rglob(lost.digest)).unlink()
    fresh = StateStore(store.where)
    for handle, says in ((bad, "altered or damaged"), (lost, "missing")):
        with pytest.raises(StateFileError, match=says):
            fresh.load(handle.id)
    found = fresh.verify()
    assert len(found.problems) == 2 and (found.states, found.objects) == (3, 3)
    assert {bad.id in p or lost.id in p for p in found.problems} == {True} and good.id not in str(
        found.problems
    )
    fresh.put(tiny(range(30)))  # the same state once more brings a lost object back
    assert len(fresh.verify().problems) == 1


def test_export_and_import(store, tmp_path):
    handle = store.put(tiny(range(9)), tenant="a", name="x", ids=range(9))
    size = store.export("x", tmp_path / "x.state", tenant="a", key=b"k")
    assert size == (tmp_path / "x.state").stat().st_size
    other = StateStore(tmp_path / "other")
    back = other.import_(tmp_path / "x.state", tenant="a", key=b"k", model=MODEL, name="y")
    assert other.load("y", tenant="a").id == tiny(range(9)).id and back.digest == handle.digest
    assert other.ids("y", tenant="a") == tuple(range(9))
    for refused in ({"tenant": "b", "key": b"k"}, {"tenant": "a", "key": b"other"}):
        with pytest.raises(StateFileError, match="not signed with this key"):
            other.import_(tmp_path / "x.state", **refused)
    with pytest.raises(StateMismatchError):
        other.import_(tmp_path / "x.state", model=replace(MODEL, config="?"))
    buffer = io.BytesIO()
    store.export("x", buffer, tenant="a")
    buffer.seek(0)
    assert other.import_(buffer).position == 9
    with pytest.raises(StateFileError):
        other.import_(io.BytesIO(b"no state"))


def test_tiers(tmp_path):
    size = tiny(range(9)).nbytes
    store = StateStore(tmp_path, memory_bytes=2 * size)
    handles = [store.put(tiny(range(n))) for n in (9, 20, 30)]
    memory = store.stats()["tiers"]["memory"]
    assert (memory["states"], memory["bytes"], memory["evictions"]) == (2, 2 * size, 1)
    (
        store.load(handles[2].id),
        store.load(handles[1].id),
        store.load(handles[0].id),
    )  # the last comes from disk
    stats = store.stats()
    assert (stats["tiers"]["memory"]["hits"], stats["tiers"]["memory"]["misses"]) == (2, 1)
    assert stats["objects_read"] == 1 and stats["tiers"]["storage"]["objects"] == 3
    assert store.load(handles[1].id).tensors is not None and store.stats()["objects_read"] == 1
    meta = store.load(handles[0].id, device="meta")  # a device's tier is one of its own
    assert meta.tensors["layers.0.mixer.S"].device.type == "meta"
    assert store.stats()["tiers"]["meta"]["states"] == 1


def test_a_row_of_a_batch_does_not_keep_the_batch(store):
    batch = torch.randn(64, 2, 4, 4)
    handle = store.put(replace(tiny(range(9)), tensors={"S": batch[3:4]}))
    held = store.load(handle.id).tensors["S"]
    assert torch.equal(held, batch[3:4]) and held.untyped_storage().nbytes() == held.nbytes
    batch.zero_()  # what its owner does with it is not ours to see
    assert held.abs().sum() > 0


def test_threads_share_a_store(store):
    failures = []

    def work(seed):
        try:
            for n in range(8):
                handle = store.put(tiny(range(5 + (seed + n) % 6)), name="newest", move=True)
                assert store.load(handle.id).position == handle.position
                if n % 3 == 0:
                    store.gc()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and store.usage()["states"] == 32
    assert sum(h.name == "newest" for h in store.list()) == 1
    assert store.verify().problems == ()


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_object_storage_by_url(tmp_path, kind):
    pytest.importorskip("obstore")
    url = (tmp_path / "far").as_uri() if kind == "file" else "memory://"
    store = StateStore(url, catalogue=tmp_path / "catalogue.sqlite", memory_bytes=0)
    handle = store.put(tiny(range(9)), ids=range(9))
    store.put(tiny(range(20)), name="gone")
    assert store.load(handle.id).id == tiny(range(9)).id
    store.delete("gone")
    assert (store.gc().objects, objects(store)) == (0, 2)
    assert store.verify().problems == ()
    store.objects.delete(handle.digest)
    with pytest.raises(StateFileError, match="missing"):
        store.load(handle.id)


def test_what_cannot_be_opened(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="needs a file on a local disk"):
        StateStore("s3://bucket/x")
    with pytest.raises(InputError, match="cannot open the object storage"):
        StateStore("nonsense://x", catalogue=tmp_path / "c")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot make"):
        StateStore(tmp_path / "file")
    (tmp_path / "catalogue.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(StateFileError, match="cannot open the store's catalogue"):
        StateStore(tmp_path)
    later = StateStore(tmp_path / "later")
    with later.catalogue.writing() as db:
        db.execute("PRAGMA user_version = 9")
    with pytest.raises(StateFileError, match=r"format 9.*update Linstate"):
        StateStore(tmp_path / "later")
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(InputError, match=r"pip install 'linstate\[store\]'"):
        StateStore("s3://bucket/x", catalogue=tmp_path / "c")
