"""What is measured of stored states gives figures of the right things; the figures themselves are in the docs."""

from __future__ import annotations

import pytest

from linstate.bench import composing, finding
from linstate.bench import store as bench_store
from small_models import build


def test_look_ups(tmp_path):
    rows = bench_store.measure(tmp_path, build("delta"), states=60, calls=10, find=False)
    assert [row.calls for row in rows] == [10, 10, 10]
    assert all(0 < row.p50 <= row.p99 <= row.longest for row in rows)


def test_searches(tmp_path):
    pytest.importorskip("lancedb")
    rows = bench_store.measure(tmp_path, build("delta"), states=60, calls=10)
    assert [row.what.split(",")[0] for row in rows[3:]] == [
        "find by words",
        "find by vectors",
        "find by hybrid",
    ]


def test_finding(tmp_path):
    pytest.importorskip("lancedb")
    rows = {row.how: row for row in finding.measure(tmp_path, build("delta"), count=5, size=600)}
    assert set(rows) == {"hybrid", "words", "vectors"} and {row.asked for row in rows.values()} == {5}
    assert all(row.first <= row.among_five == 5 for row in rows.values() if row.how != "words")


def test_composing():
    rows = composing.measure(build("delta"), texts=(2,), rounds=1)
    assert [row.way for row in rows] == [
        "the right text alone", "reading all", "sum", "average", "caso", "picaso",
    ]  # fmt: skip
    assert {row.asked for row in rows} == {4}
    assert [row.label for row in rows] == ["exact", "exact", *["approximate"] * 4]


def test_composing_what_refuses():
    rows = {row.way: row.label for row in composing.measure(build("hybrid"), texts=(2,), rounds=1)}
    assert rows["reading all"] == "exact" and rows["sum"] == rows["picaso"] == "refused"
