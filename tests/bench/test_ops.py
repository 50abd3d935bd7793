"""``linstate bench ops``: the same work for everybody, fair turns, honest gaps. No test here looks at the machine's clock."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from linstate.bench import memory, mixers, ops, peers, steps
from linstate.bench.cases import CASES, Shape
from linstate.bench.measure import Gemm, in_turn
from linstate.bench.ops import Cell, Plan, Row, Skipped, crossovers, implementations
from linstate.errors import ArgumentError
from linstate.ops import native, softmax_attention
from linstate.ops.dispatch import TABLE
from linstate.ops.native import rwkv as native_rwkv

SHAPE = Shape(tokens=64, heads=2, size=16)


class Rates(ops.Rates):
    """Known rates, and matmuls that take no time to choose."""

    def __init__(self, float32: float = 100.0, bfloat16: float = 400.0) -> None:
        self.rates = {torch.float32: float32, torch.bfloat16: bfloat16}
        self.gemms = {d: Gemm(8, lambda d=d: torch.mm(*[torch.ones(8, 8, dtype=d)] * 2)) for d in self.rates}


def plan(**changes) -> Plan:
    given = {"tokens": (64,), "dtypes": (torch.float32,), "heads": 2, "size": 16, "rounds": 1}
    return Plan(**(given | changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_everybody_does_the_same_work(name: str, dtype: torch.dtype) -> None:
    case, shape = CASES[name], replace(SHAPE, tokens=128, dtype=dtype)
    inputs = case.inputs(shape)
    true, _ = case.call(inputs, form="recurrent", backend="torch")
    isas = native.isas() if (case.recurrence, "chunked", "native") in TABLE else ()
    found = [one for one in implementations(case, isas) if one.kind != "softmax"]
    assert len(found) > len(isas)
    for one in found:
        o = one.output(one.bind(inputs, case.at(shape))()).flatten(2).float()
        off = (o - true.flatten(2).float()).norm() / true.float().norm()
        assert off < (1e-4 if dtype == torch.float32 else 2e-2), f"{one.who}: off by {off:.1e}"


@torch.no_grad()
def test_softmax_attention_is_causal_and_of_the_shape() -> None:
    soft = next(one for one in implementations(CASES["dplr, g per channel"]) if one.who == "softmax float32")
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 64, 16, generator=random).transpose(1, 2) for _ in range(3))
    expected, _ = softmax_attention(q, k, v)
    torch.testing.assert_close(soft.output(soft.bind({}, SHAPE)()), expected)


def test_peers_belong_to_cases_and_are_found() -> None:
    assert set(peers.PEERS) <= set(CASES)
    if "transformers" not in peers.missing():
        found = [p for of in peers.PEERS.values() for p in of if p.who == "transformers"]
        assert len(found) == 6 and all(peer.find() is not None for peer in found)
    if not {"fla-core", "einops"} & set(peers.missing()):
        found = [p for of in peers.PEERS.values() for p in of if p.who == "FLA naive"]
        assert len(found) == 7 and all(peer.find() is not None for peer in found)


def test_operations_are_those_of_the_matmuls() -> None:
    """Counted by torch on our torch form, which multiplies whole triangles; ours counts half of them."""
    case, shape = CASES["linear_attention, no gate"], Shape(128, heads=3, size=32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        case.call(case.inputs(shape), form="chunked", backend="torch")
    triangles = 64 * (32 + 32)  # the other halves, two for each token and head
    assert counter.get_total_flops() == (case.flops(shape) + triangles) * 128 * 3
    assert CASES["delta_rule, g per head"].flops(Shape()) == 6 * 128**2 + 2 * 64 * 256
    assert CASES["dplr, g per channel"].at(Shape()).size == 64


class Clock:
    """A clock that runs only where a call says so."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, list[str]()

    def __call__(self) -> float:
        return self.now

    def run(self, name: str, seconds: float):
        def call() -> None:
            self.calls.append(name)
            self.now += seconds

        return call


def test_turns_alternate_and_the_first_call_does_not_count() -> None:
    clock = Clock()
    times = in_turn({n: clock.run(n, 1.0) for n in "abc"}, rounds=3, budget=10, clock=clock)
    assert "".join(clock.calls) == "abc" + "abc" + "cba" + "abc"
    assert all(timing.turns == (1.0, 1.0, 1.0) for timing in times.values())


def test_slow_calls_have_fewer_turns_and_short_ones_are_repeated() -> None:
    clock = Clock()
    runs = {
        "slow": clock.run("slow", 4.0),
        "endless": clock.run("endless", 60.0),
        "short": clock.run("s", 2e-3),
    }
    times = in_turn(runs, rounds=5, budget=10, clock=clock)
    assert [len(timing.turns) for timing in times.values()] == [2, 1, 5]
    assert clock.calls.count("s") == 2 + 5 * 5 and times["short"].median == pytest.approx(2e-3)
    first, second = (n for n, name in enumerate(clock.calls[3:]) if name == "slow")
    assert second - first > 15, "its turns are spread over the rounds: three of the short one's lie between"


def test_rows_say_what_was_measured() -> None:
    (cell,) = ops.sweep(plan(only="delta_rule, g per head"), Rates())
    by_who = {row.who: row for row in cell.rows}
    assert {"torch", "softmax float32", "softmax bfloat16"} <= set(by_who)
    assert {row.who for row in cell.rows if row.kind == "native"} == {
        f"native {isa}" for isa in native.isas()[:1]
    }
    row = by_who["torch"]
    operations = (6 * 16 * 16 + 2 * 64 * 32) * 64 * 2
    assert row.gflops == pytest.approx(operations / row.ms / 1e6) and row.share == pytest.approx(
        row.gflops / cell.gemm
    )
    assert row.us_per_token_head == pytest.approx(row.ms * 1e3 / 128)
    assert next(row for row in cell.rows if row.kind in ops.OURS).times_ours == 1
    assert by_who["softmax float32"].gflops is None and not cell.skipped


def test_the_measure_of_bfloat16_is_the_faster_matmul() -> None:
    assert Rates().measure_of(torch.bfloat16) is not Rates().measure_of(torch.float32)
    slow = Rates(bfloat16=1.0)
    assert slow.bfloat16_is_slower and slow.measure_of(torch.bfloat16) is slow.gemms[torch.float32]
    assert not Rates().bfloat16_is_slower and Rates().as_json()["gflops"] == {"float32": 100, "bfloat16": 400}


def test_what_is_too_slow_or_too_large_is_left_out_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "linear_attention, no gate"
    fast = ops.Implementation("fast", "torch", "", lambda inputs, shape: lambda: torch.ones(()))
    soft = replace(fast, who="soft", kind="softmax", power=2)
    large = replace(fast, who="large", floats=lambda size: 10**15)
    grid = replace(fast, who="grid", multiple=64)
    monkeypatch.setattr(ops, "implementations", lambda case, isas: [fast, soft, large, grid])
    series = ops._Series(CASES[name], torch.float32, plan(limit=3.0), Rates())
    monkeypatch.setattr(ops, "free_bytes", lambda: 10**9)
    series.known = {"fast": (64, 1.0), "soft": (64, 1.0), "large": (64, 1.0), "grid": (64, 1.0)}
    cell = series.cell(130)
    reasons = {one.who: one.reason for one in cell.skipped}
    assert {row.who for row in cell.rows} == {"fast"} and set(reasons) == {"soft", "large", "grid"}
    assert reasons["soft"] == "one call would take about 4 s (--limit 3)"
    assert "GB of memory, 1 GB are free" in reasons["large"] and "multiples of 64" in reasons["grid"]


def test_what_fails_or_refuses_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "delta_rule, no gate"

    def broken(function, inputs):
        raise TypeError("another version")

    other = peers.Peer("transformers", "f", lambda: 1, broken)
    monkeypatch.setitem(peers.PEERS, name, (other,))
    monkeypatch.delitem(TABLE, ("delta_rule", "chunked", "native"), raising=False)
    isas = native.isas()[:1]
    (cell,) = ops.sweep(plan(only=name, isas=isas), Rates())
    reasons = {one.who: one.reason for one in cell.skipped}
    assert reasons["transformers"] == "failed: TypeError: another version"
    assert {row.kind for row in cell.rows} == {"torch", "softmax"}
    assert all("no such kernel" in reasons[f"native {isa}"] for isa in isas)


def test_wrong_wishes_are_refused() -> None:
    with pytest.raises(ArgumentError, match="no case has 'nothing'"):
        plan(only="nothing")
    with pytest.raises(ArgumentError, match="instruction set 'vax' is not on this machine"):
        plan(isas=("vax",))


def row(who: str, kind: str, tokens: int, ms: float) -> Row:
    nothing = {
        "case": "c",
        "model": "",
        "function": "",
        "heads": 1,
        "size": 1,
        "dtype": "float32",
        "turns": 1,
    }
    numbers = {"us_per_token_head": ms * 1e3 / tokens, "gflops": None, "share": None, "times_ours": None}
    return Row(who=who, kind=kind, tokens=tokens, ms=ms, fastest_ms=ms, **nothing, **numbers)


def cells(*times: tuple[int, float, float, float | None]) -> list[Cell]:
    found = []
    for tokens, ours, soft32, soft16 in times:
        rows = [row("torch", "torch", tokens, ours), row("softmax float32", "softmax", tokens, soft32)]
        if soft16 is not None:
            rows.append(row("softmax bfloat16", "softmax", tokens, soft16))
        found.append(Cell("c", tokens, "float32", 1.0, tuple(rows), ()))
    return found


def test_the_crossover_is_where_the_lines_meet() -> None:
    """Ours takes T, theirs T^2 / 200: they meet at 200, also when the faster precision changes between."""
    exact = cells(*((t, t, t * t / 200, None) for t in (64, 1024)))
    assert [(one.tokens, one.text) for one in crossovers(exact)] == [(200, "200")]
    faster = cells((64, 64, 99, 64 * 64 / 200), (1024, 1024, 1024**2 / 200, 9999))
    assert crossovers(faster)[0].tokens == 200
    assert crossovers(cells((64, 1, 2, 3), (256, 1, 2, 3)))[0].text == "< 64"
    assert crossovers(cells((64, 5, 2, 3), (256, 5, 2, 3)))[0].text == "> 256"
    again = cells(*((t, 1 if t in (128, 1024) else 3, 2, None) for t in (64, 128, 256, 512, 1024)))
    assert 512 < crossovers(again)[0].tokens < 1024, "only for good counts"


def test_json_is_json_and_complete() -> None:
    skipped = Skipped("c", "softmax float32", 64, "float32", "too slow")
    given = [replace(cells((64, 1, 2, 3))[0], skipped=(skipped,))]
    made = json.loads(json.dumps(ops.as_json(plan(), Rates(), given), allow_nan=False))
    assert (
        len(made["rows"]) == 3
        and made["rows"][0]["gemm_gflops"] == 1
        and made["skipped"][0]["reason"] == "too slow"
    )
    assert (
        made["machine"]["versions"]["torch"] == torch.__version__ and made["crossovers"][0]["text"] == "< 64"
    )
    assert set(made["flops_per_token_head"]) == set(CASES)


def test_steps_stand_beside_the_copy_of_their_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "RING_BYTES", 2**20)
    found = list(steps.steps(heads=2, size=16, rounds=1, isas=native.isas()[:1]))
    expected = [(name, batch) for name in (*CASES, *mixers.STEPS) for batch in steps.BATCHES]
    assert [(rows[0].case, rows[0].batch) for rows in found] == expected
    for rows in found:
        assert [step.who for step in rows][-1] == "torch"
        assert all(step.times_copy == pytest.approx(step.us / step.copy_us) for step in rows)
    scalar = found[list(CASES).index("delta_rule, g per head") * 3 + 1][0]
    assert scalar.state_bytes == 8 * 2 * 16 * 16 * 4
    mixer = next(rows[0] for rows in found if rows[0].case.startswith("gated_deltanet"))
    assert (
        mixer.state_bytes == (2 * 16 * 16 + 3 * 3 * 2 * 16) * 4
    )  # the matrix, and three inputs of q, k and v


@pytest.mark.skipif(not native.available, reason="no native kernels")
@pytest.mark.parametrize("name", mixers.STEPS)
def test_a_mixer_without_its_projections_steps_natively_and_by_torch(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both give the state that the other gives, and only one of them asks a native step."""
    calls: list[int] = []

    def counting(run: Any) -> Any:
        return lambda *a, **k: calls.append(1) or run(*a, **k)

    kernel = TABLE["fused", "step", "native"]
    monkeypatch.setitem(TABLE, ("fused", "step", "native"), replace(kernel, run=counting(kernel.run)))
    monkeypatch.setattr(native_rwkv, "time_mix", counting(native_rwkv.time_mix))
    shape = mixers.at(name, Shape(1, heads=2, size=16, batch=3))
    mixer = mixers.build(name, shape)
    ring = [mixer.init_state(3)]
    with torch.no_grad():
        _, ours = mixers.step(mixer, shape, ring, native.isa())()
        assert calls == [1]
        _, by_torch = mixers.step(mixer, shape, ring, None)()
    assert calls == [1] and native.available and native.reason is None
    for part, t in by_torch.items():
        torch.testing.assert_close(ours[part], t, atol=1e-5, rtol=1e-4)


def test_the_copy_reads_one_state_and_writes_another() -> None:
    ring = [torch.full((2,), float(n)) for n in range(4)]
    copy = steps._copy(ring)
    copy()
    copy()
    assert [state[0].item() for state in ring] == [0, 1, 0, 1]


@pytest.mark.skipif(memory.peak_bytes() is None, reason="this system does not say what is resident")
def test_extra_memory_is_what_lies_beyond_inputs_and_outputs() -> None:
    """A call that takes 48 MB, gives it back, and returns 16 MB; a peak of 200 MB was before it."""
    code = """
import torch
from linstate.bench.memory import extra_bytes
gone = torch.ones(50 * 2**20); del gone
def run():
    for _ in range(2): part = torch.ones(12 * 2**20); del part
    return torch.ones(4 * 2**20), None
print(extra_bytes(run))
"""
    settings = {**os.environ, **memory._ALLOCATOR, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=settings, capture_output=True, text=True, check=True
    )
    # the 16 MB are taken when the 48 are already back: the peak stands 32 MB above what was returned
    assert int(done.stdout) == pytest.approx(32 * 2**20, abs=2 * 2**20)


@pytest.mark.slow
@pytest.mark.skipif(memory.peak_bytes() is None, reason="this system does not say what is resident")
def test_memory_in_a_process_of_its_own() -> None:
    few, many = (
        memory.in_child("linear_attention, no gate", "torch", 4096, h, 64, "float32") for h in (1, 4)
    )
    assert few is not None and many is not None and many > few > 0
    assert memory.in_child("linear_attention, no gate", "nobody", 64, 1, 16, "float32") is None


def test_the_picture_has_a_panel_for_each_case(tmp_path: Path) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="extra 'plot' is not installed")
    from linstate.bench import plot

    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pyplot, "close", drawn.append)
        both = [*cells((64, 64, 20, None), (1024, 1024, 5000, None))]
        plot.draw([*both, *(replace(cell, dtype="bfloat16") for cell in both)], "title", tmp_path / "x.png")
    titles = [axes.get_title() for axes in drawn[0].axes if axes.lines]
    assert titles == ["\nc, float32", "\nc, bfloat16"]
    line = drawn[0].axes[0].lines[0]
    assert list(line.get_xdata()) == [64, 1024] and list(line.get_ydata()) == [1000.0, 1000.0]
    assert (tmp_path / "x.png").stat().st_size > 10_000
    assert math.isclose(drawn[0].axes[0].texts[0].xy[0], crossovers(both)[0].tokens)
