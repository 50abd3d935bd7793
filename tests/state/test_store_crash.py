"""Whoever is killed while it writes loses nothing that was acknowledged, and breaks nothing for others."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from linstate.errors import QuotaError, StateNotFoundError
from linstate.state.store import StateStore
from tiny_states import tiny

HERE = Path(__file__).resolve().parent
KILLS = 210


@pytest.fixture
def quick_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: what a kill leaves is the same, and flushing costs nothing."""
    memory = Path("/dev/shm")
    if not (memory.is_dir() and os.access(memory, os.W_OK)):
        yield tmp_path
        return
    folder = Path(tempfile.mkdtemp(dir=memory))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.slow
def test_hundreds_of_kills_lose_nothing(quick_folder: Path) -> None:
    paths = [str(HERE.parent), *(path for path in sys.path if path)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "killed_writers.py"), str(quick_folder), str(KILLS // 3)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["kills"] == KILLS
    acknowledged = dict(report["acknowledged"])
    assert len(acknowledged) > KILLS / 3  # there was something to lose
    store = StateStore(quick_folder, memory_bytes=0)
    for _ in range(2):  # before a collection, and after it
        assert store.verify().problems == ()
        for handle, content in acknowledged.items():
            assert store.load(handle).id == content
        store.gc()
    counted = store.catalogue.db.execute(
        "SELECT (SELECT COUNT(*) FROM states), (SELECT SUM(b) FROM (SELECT MAX(bytes) AS b FROM refs GROUP BY object))"
    ).fetchone()
    assert (store.usage()["states"], store.usage()["bytes"]) == tuple(counted)
    assert {name for name, _ in store.objects.list()} == {
        row[0] for row in store.catalogue.db.execute("SELECT DISTINCT object FROM refs")
    }


def test_a_collection_between_bytes_and_handle_takes_nothing(tmp_path, monkeypatch):
    store, state = StateStore(tmp_path, memory_bytes=0), tiny(range(9))
    write = store._writing.write

    def then_collected(*arguments):
        new = write(*arguments)
        assert StateStore(tmp_path).gc().objects == 2  # nobody needs them yet
        return new

    monkeypatch.setattr(store._writing, "write", then_collected)
    handle = store.put(state, ids=range(9))
    assert store.load(handle.id).id == state.id
    assert store.ids(handle.id) == tuple(range(9))


def test_a_put_that_fails_leaves_no_handle(tmp_path, monkeypatch):
    store = StateStore(tmp_path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(store.objects, "write", fail)
    with pytest.raises(OSError, match="disk full"):
        store.put(tiny(range(9)), name="x")
    with pytest.raises(StateNotFoundError):
        store.get("x")
    assert store.usage()["states"] == 0


def test_a_transaction_that_fails_leaves_nothing(tmp_path, monkeypatch):
    store = StateStore(tmp_path)

    def fail(*_, **__):
        raise OSError("fails here")

    with monkeypatch.context() as patch:
        patch.setattr(store._writing, "insert", fail)
        with pytest.raises(OSError, match="fails here"):
            store.put(tiny(range(9)))
    assert store.usage()["bytes"] == 0
    assert list(store.objects.list()) == []
    assert store.verify().problems == ()


def test_what_a_quota_refuses_takes_no_room(tmp_path):
    store = StateStore(tmp_path, max_states=1)
    store.put(tiny(range(9)))
    for length in range(10, 30):
        with pytest.raises(QuotaError, match="1 states"):
            store.put(tiny(range(length)), ids=range(length))
    assert len(list(store.objects.list())) == 1
