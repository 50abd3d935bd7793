"""The comparison compares what it says: equal sizes, tasks by their definitions, sentences from numbers. No clock is looked at."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from linstate import mixers
from linstate.bench.compare import capacity, cost, evidence, jobs, learning, sizes, speed, tables
from linstate.bench.compare.jobs import Run, Settings
from linstate.bench.compare.report import markdown
from linstate.bench.compare.tasks import IGNORED, TASKS, Task, parity, recall, selective_copying
from linstate.errors import ArgumentError, ConfigError, InputError
from linstate.models import Decoder

DOCS = Path(__file__).parent.parent.parent / "docs"


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("d_model", "layers"), [(64, 2), (speed.D_MODEL, speed.LAYERS), (cost.D_MODEL, 1)])
def test_all_models_have_the_same_number_of_weights(d_model, layers):
    with torch.device("meta"):
        counts = {
            name: sizes.weights_of(Decoder(sizes.config(name, 16, d_model, layers)))
            for name in mixers.names()
        }
    base = counts[sizes.BASE]
    assert {name: n / base for name, n in counts.items() if abs(n / base - 1) > 0.01} == {}


def test_a_mixer_larger_than_a_block_is_refused():
    with pytest.raises(ArgumentError, match="more weights than a whole block"):
        sizes.config("mamba2", 16, 64, 2, {"state_size": 1024})


def test_recall_is_that_of_zoology():
    ids, labels = recall(200, draw(), vocab_size=64, tokens=32, pairs=6)
    keys, values = ids[:, 0:12:2], ids[:, 1:12:2]
    assert keys.min() >= 1 and keys.max() < 32 <= values.min() and values.max() < 64
    assert (labels[:, :12] == IGNORED).all()
    gaps = []
    for row in range(200):
        known = dict(zip(keys[row].tolist(), values[row].tolist(), strict=True))
        asked = (labels[row] != IGNORED).nonzero().flatten().tolist()
        assert len(known) == 6 and {ids[row, t].item() for t in asked} == set(known)
        assert all(labels[row, t] == known[ids[row, t].item()] and t % 2 == 0 for t in asked)
        gaps += [(t - 12) // 2 for t in asked]
    counts = torch.bincount(torch.tensor(gaps), minlength=10)
    assert counts[0] > 1.3 * counts[5] > 1.3 * 0.9 * counts[9], "near questions are more frequent"
    with pytest.raises(ArgumentError, match="at least 36 tokens"):
        recall(1, draw(), vocab_size=64, tokens=32, pairs=9)


def test_selective_copying_asks_for_the_letters_in_order():
    ids, labels = selective_copying(20, draw(), letters=5, tokens=30, marked=4)
    for row, asked in zip(ids, labels, strict=True):
        assert row[:30][row[:30] < 5].tolist() == asked[30:].tolist()
        assert (row[30:] == 6).all() and (asked[:30] == IGNORED).all()


def test_parity_counts_ones():
    bits, labels = parity(5, draw(), tokens=20, asked=15)
    assert (labels[:, :15] == IGNORED).all()
    assert labels[:, 19].tolist() == [int(row.sum()) % 2 for row in bits]


def test_capacity_is_what_theory_says():
    found = {
        (name, kind): capacity.measure(name, kind, 1)
        for name in ("softmax_attention", "linear_attention", "delta_rule", "dplr", "delta_rule, read again")
        for kind in capacity.KINDS
    }
    size = capacity.SIZE
    for name in ("linear_attention", "delta_rule", "dplr"):
        assert capacity.exact(found[name, "orthogonal"]) == capacity.theory("orthogonal") == size
    assert capacity.recalls(found["softmax_attention", "random"]) == capacity.PAIRS[-1]
    linear = found["linear_attention", "random"]
    assert capacity.exact(linear) == 0
    assert capacity.theory("random") == pytest.approx(295.5, abs=0.1)
    assert capacity.recalls(linear) < capacity.theory("random") < 2 * capacity.recalls(linear, 0.5)
    assert found["dplr", "random"]["recalled"] == found["delta_rule", "random"]["recalled"]
    once, again = (found[name, "random"] for name in ("delta_rule", "delta_rule, read again"))
    assert capacity.exact(once) == 0 < capacity.exact(again)
    assert capacity.recalls(once) < capacity.recalls(again) == size, "least squares holds K independent keys"


def test_ideal_keys():
    orthogonal = capacity.keys("orthogonal", 24, 16, draw())
    torch.testing.assert_close(orthogonal[:16] @ orthogonal[:16].T, torch.eye(16), atol=1e-5, rtol=0)
    assert torch.equal(orthogonal[16:], orthogonal[:8])
    assert capacity.keys("random", 24, 16, draw()).norm(dim=-1).sub(1).abs().max() < 1e-5


def _echo(rows: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(8, (rows, 12), generator=generator)
    return ids, F.pad(ids[:, :-1], (1, 0), value=IGNORED)


def test_training_learns_is_seeded_and_ends_early():
    task = Task(8, (_echo,), {"echo": _echo}, 1 / 8, "echo", enough=0.1)
    one, two = (
        learning.train(task, "deltanet", options={}, rate=1e-2, steps=200, rows=16, d_model=32, layers=1)
        for _ in range(2)
    )
    assert one["accuracy"] == two["accuracy"] and one["loss"] == two["loss"]
    assert one["accuracy"]["echo"] > 0.95 and one["loss"] < 0.1 and 20 < one["steps"] < 200
    short = learning.train(task, "deltanet", options={}, rate=1e-2, steps=1, rows=16, d_model=32, layers=1)
    assert short["accuracy"]["echo"] < 0.5 and short["steps"] == 1


def test_speeds_are_medians_of_rounds():
    def one(base: float, mine: float) -> dict:
        return {
            name: {"100": {"prefill": t, "decode": t}} for name, t in ((sizes.BASE, base), ("deltanet", mine))
        }

    found = speed.summary([one(4, 2), one(40, 10), one(4, 1)])["deltanet"]
    assert found["prefill"]["100"] == {"tokens_per_second": 50.0, "times_attention": 4.0}
    assert found["decode"]["100"]["tokens_per_second"] == 0.5


def test_a_round_measures_every_mixer():
    (round_,) = [speed.measure(("attention", "deltanet"), (8,))]
    assert set(round_) == {"attention", "deltanet"} and round_["deltanet"]["8"]["prefill"] > 0


def test_settings():
    quick, full = Settings.of(full=False), Settings.of(full=True)
    assert quick.mixers[0] == sizes.BASE and set(quick.mixers) == set(mixers.names())
    assert set(full.trained("recall")) == set(mixers.names()) > set(quick.trained("recall"))
    named = Settings.of(full=False, only=("tasks",), mixers_=("based",))
    assert named.mixers == ("attention", "based") == tuple(named.trained("parity"))
    assert named.command() == "linstate compare --quick --only tasks --mixers attention,based"
    keys = [job.key for job in jobs.jobs(Settings.of(full=False, mixers_=("deltanet",)))]
    assert "tasks/parity/deltanet [0, 1]/0.005" in keys and "tasks/parity/deltanet [-1, 1]/0.005" in keys
    assert len(keys) == len(set(keys))
    with pytest.raises(ArgumentError, match="no section 'x'; there are: cost, speed, capacity, tasks"):
        Settings.of(full=False, only=("x",))
    with pytest.raises(ConfigError, match="no mixer 'x'"):
        Settings.of(full=False, mixers_=("x",))


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    settings = Settings.of(full=False, only=("cost",), mixers_=("deltanet", "gla"))
    done = []

    def perform(job):
        if job.key == "cost/gla" and "cost/gla" not in done:
            done.append(job.key)
            raise KeyboardInterrupt
        done.append(job.key)
        return job.key, {"of": job.key}

    monkeypatch.setattr(jobs, "perform", perform)
    run = Run(settings, tmp_path / "r.json")
    with pytest.raises(KeyboardInterrupt):
        run.go_on(1)
    again = Run.load(tmp_path / "r.json")
    assert again.settings == settings and list(again.results) == ["cost/attention", "cost/deltanet"]
    again.go_on(1)
    assert done == ["cost/attention", "cost/deltanet", "cost/gla", "cost/gla"]
    assert Run.load(tmp_path / "r.json").missing() == []
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(InputError, match="holds no measurements of format 1"):
        Run.load(tmp_path / "other.json")


def small_run() -> Run:
    """A run whose numbers are made up, but for those of cost."""
    run = Run(Settings.of(full=False, mixers_=("deltanet", "mamba2")))
    for name in run.settings.mixers:
        run.results[f"cost/{name}"] = cost.measure(name)
    seconds = {"attention": 4.0, "deltanet": 1.0, "mamba2": 4.0}
    run.results["speed/0"] = {n: {"512": {"prefill": s, "decode": s}} for n, s in seconds.items()}
    run.results["tasks/parity/deltanet [-1, 1]/0.005"] = _result("parity", 0.95)
    run.results["tasks/parity/deltanet [0, 1]/0.005"] = _result("parity", 0.5)
    run.results["tasks/recall/mamba2/0.01"] = _result("recall", 0.7)
    run.results["tasks/recall/mamba2/0.003"] = _result("recall", 0.8)
    return run


def _result(task: str, right: float) -> dict:
    return {"accuracy": dict.fromkeys(TASKS[task].test, right), "loss": 1.0, "steps": 7, "weights": 1}


def test_evidence_is_what_was_measured():
    run = small_run()
    found = {(f.good, f.text) for f in evidence.findings(run, "deltanet")}
    assert (True, "decode at 512 tokens 4.00x softmax attention's speed") in found
    assert (
        True,
        "parity with eigenvalues in [-1, 1] in 7 steps: 95% right (81 to 160, longer)",
    ) in found
    assert (
        False,
        "parity with eigenvalues in [0, 1] not learned in 7 steps: 50% right (81 to 160, longer)",
    ) in found
    assert any(good and text.startswith("state of 150kB at 1,000,000 tokens") for good, text in found)
    mamba2 = {f.text: f.good for f in evidence.findings(run, "mamba2")}
    assert mamba2["recall in 7 steps: 80% right (8 pairs)"] is None, "the better learning rate counts"
    assert not any("speed" in text for text in mamba2), "as fast as softmax attention is not said"
    grows = [f for f in evidence.findings(run, "attention") if "grows" in f.text]
    assert [f.good for f in grows] == [False]
    assert evidence.findings(Run(run.settings), "deltanet") == [], "nothing measured, nothing said"


def test_capacity_is_said_of_mixers_that_there_are():
    said = [name for held_by in tables.BARE.values() for name in held_by]
    assert set(said) <= set(mixers.names()) and len(said) == len(set(said))
    assert all(
        mixers.find(name).recurrence == case for case, held_by in tables.BARE.items() for name in held_by
    )
    assert set(tables.BARE) <= set(capacity.CASES)


def test_the_report_shows_the_tables_of_the_run():
    run = small_run()
    text = markdown(run, "page")
    assert {t.name for t in tables.tables(run)} == {"cost", "speed", "parity", "recall"}
    for table in tables.tables(run):
        assert table.markdown() in text and f"](page/{table.name}.png)" in text
    assert "| `mamba2` | 80.0% | 80.0% | 80.0% | 1.000 | 7 | 0.003 |" in text
    assert "Not trained in this run: `attention`, `deltanet`." in text
    assert run.settings.command() in text and run.machine["versions"]["torch"] in text


def test_the_page_is_that_of_the_run_that_comes_with_the_package():
    run = evidence.measured()
    assert run is not None and not run.missing()
    assert (DOCS / "compare.md").read_text("utf-8") == markdown(run, "compare"), (
        "run: linstate compare --resume --json src/linstate/bench/compare/measured.json --report docs/compare.md"
    )
    assert {path.stem for path in (DOCS / "compare").glob("*.png")} == {t.name for t in tables.tables(run)}
