"""``mixers``, ``doctor``, ``eval``, ``train``."""

from __future__ import annotations

import hashlib
import json
import signal
from pathlib import Path

import pytest

from cli.conftest import prose
from linstate import LanguageModel, mixers
from linstate.cli import doctor
from linstate.mixers import encoders
from linstate.ops import native
from linstate.ops.dispatch import TABLE, Kernel


def test_mixers_lists_every_file_in_the_room(cli):
    found = {row["name"]: row for row in cli("mixers", "--json").json}
    assert set(found) == {*mixers.names(), *encoders.names()}
    assert found["fnet"]["state_bytes"] is None and found["fnet"]["recurrence"] == "none (encoder)"
    assert found["attention"]["grows"] is True and found["gated_deltanet"]["grows"] is False
    assert found["attention"]["state_bytes"] >= 2 * 512 * 1000 * 4
    wide = {row["name"]: row for row in cli("mixers", "--json", "--d-model", 768).json}
    assert wide["gated_deltanet"]["state_bytes"] > found["gated_deltanet"]["state_bytes"]
    table, long = cli("mixers").out, cli("mixers", "--long").out
    assert all(name in table and name in long for name in (*mixers.names(), *encoders.names()))
    assert "conv_width=4" in long and "it reads a whole text at once" in long


def test_doctor(cli):
    done = cli("doctor", "--json")
    found = done.json
    assert done.code == 0 and found["sound"] is True
    served = {(row["recurrence"], row["form"]): row["backends"] for row in found["backends"]}
    assert served["delta_rule", "chunked"][-1] == "torch"
    assert all(row["serves"] in row["backends"] for row in found["backends"])
    (delta,) = [
        row for row in found["backends"] if (row["recurrence"], row["form"]) == ("delta_rule", "chunked")
    ]
    assert delta["serves"] == ("native" if native.available else "torch")
    checked = {(check["recurrence"], check["form"], check["isa"]) for check in found["self_check"]}
    assert {("delta_rule", "chunked", isa) for isa in (*native.isas(), None)} <= checked
    assert {check["recurrence"] for check in found["self_check"]} == {recurrence for recurrence, _ in served}
    assert all(0 <= check["error"] < 1e-4 for check in found["self_check"] if check["refused"] is None)
    shown = cli("doctor").out
    assert "self-check" in shown
    if native.available:
        assert f"{native.isa()} in use" in shown and f"chunked: native ({native.isa()})" in shown


def test_doctor_says_what_serves_where_native_refuses(cli, monkeypatch):
    """A backend that is in the table and takes nothing does not serve, and nothing is wrong with that."""
    refusing = Kernel("delta_rule", "chunked", "native", lambda: None, lambda call: "not today")
    monkeypatch.setitem(TABLE, ("delta_rule", "chunked", "native"), refusing)
    done = cli("doctor", "--json")
    (delta,) = [
        row for row in done.json["backends"] if (row["recurrence"], row["form"]) == ("delta_rule", "chunked")
    ]
    assert (
        done.code == 0 and delta["serves"] == "torch" and delta["backends"] == ["triton", "native", "torch"]
    )


def test_doctor_sees_what_is_wrong(cli, monkeypatch):
    from linstate import ops

    real = ops.delta_rule

    def wrong(*args, form, **kwargs):
        o, state = real(*args, form=form, **kwargs)
        return (o * 1.01 if form == "chunked" else o), state

    monkeypatch.setattr(ops, "delta_rule", wrong)
    monkeypatch.setitem(doctor.EXTRAS, "plot", ("no_such_module",))
    done = cli("doctor")
    assert (
        done.code == 1
        and "FAILED" in done.out
        and "delta_rule chunked torch: relative error 1.0e-02" in done.out
    )
    assert "missing no_such_module: pip install 'linstate[plot]'" in done.out


def test_doctor_sees_an_altered_file(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    digest = hashlib.sha256(b"{}").hexdigest()
    assert doctor._altered(tmp_path) == []
    (tmp_path / doctor.SUMS).write_text(f"{digest}  config.json\n")
    assert doctor._altered(tmp_path) == []
    (tmp_path / "config.json").write_text("{ }")
    assert doctor._altered(tmp_path) == ["config.json"]


def test_eval_asks_from_one_state_and_prints_the_table(cli, models, monkeypatch):
    from linstate.evals import pocket

    model = LanguageModel.from_pretrained(models / "tiny")
    seen = {}

    def evaluate(answer, bits, *, on_row, **settings):
        seen.update(settings, answers=answer("colour: red\n", ["colour", "size"]), bits=bits("grün".encode()))
        row = pocket.Row("unseen lookup", "16 facts", 0.5, 10, 0.99)
        on_row(row)
        return pocket.PocketTable((row, pocket.Row("real file", "x", None, skipped="not here")))

    monkeypatch.setattr(pocket, "evaluate", evaluate)
    done = cli("eval", "pocket", "--quick", "--json", "t.json", "--model", models / "tiny")
    assert done.code == 0 and "50.0%" in done.out and "missed" in done.out and "not here" in done.out
    state = model.read("colour: red\n")
    assert seen["answers"] == [model.ask("colour", state), model.ask("size", state)]
    assert seen["bits"] == model.bits("grün") and seen["documents"] < 34
    assert json.loads(Path("t.json").read_text())["rows"][0]["reached"] is False


def test_train_says_what_to_install(cli, monkeypatch):
    Path("r.toml").write_text("steps = 1\n[model]\nd_model = 16\npattern = ['gated_deltanet']\n")
    monkeypatch.setattr("linstate.cli.train.find_spec", lambda name: None)
    assert cli("train", "r.toml", "--out", "run").error.endswith("pip install 'linstate[train]'")
    Path("r.toml").write_text("steps = 1\nstepz = 2\n[model]\nd_model = 16\npattern = ['gated_deltanet']\n")
    assert "unknown: stepz" in cli("train", "r.toml", "--out", "run").error


RECIPE = """
vocab_size = 300
steps = 6
tokens_per_step = 128
lengths = [[0.0, 64]]
warmup_steps = 1
decay_steps = 2
save_steps = 100
log_steps = 1
[model]
d_model = 16
pattern = ["gated_deltanet"]
d_ff = 24
[model.options.gated_deltanet]
num_heads = 1
head_dim = 8
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_train_stops_goes_on_and_exports(cli, monkeypatch):
    """Ctrl-C saves a checkpoint and no model; the same command then ends with the model of an uninterrupted run."""
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from linstate.train import loop
    from linstate.train.corpus import Document
    from linstate.train.stream import PocketCache
    from linstate.train.tokenizer import save_tokenizer, train_tokenizer

    def prepare(work, vocab_size):
        tokenizer = train_tokenizer([prose(3000)], vocab_size)
        save_tokenizer(tokenizer, work / "tokenizer.json")
        documents = [
            Document(source=f"{kind}{i}", kind=kind, text=prose(4000, seed=i))
            for kind in ("python", "doc", "test")
            for i in range(3)
        ]
        return PocketCache.build(work / "cache", tokenizer, documents)

    monkeypatch.setattr(loop, "prepare", prepare)
    Path("r.toml").write_text(RECIPE)
    whole = cli("train", "r.toml", "--out", "whole", "--export", "out", "--dtype", "fp32")
    assert whole.code == 0 and "linstate generate" in whole.err, whole.err
    assert whole.out == ""

    real = loop.WeighingTrainer.compute_loss
    steps = []

    def compute_loss(self, *args, **kwargs):
        steps.append(self.state.global_step)
        if len(steps) == 3:
            signal.raise_signal(signal.SIGINT)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(loop.WeighingTrainer, "compute_loss", compute_loss)
    stopped = cli("train", "r.toml", "--out", "part")
    assert stopped.code == 130 and "stopped at step 3 of 6" in stopped.err
    assert not Path("part/model").exists()
    assert cli("train", "r.toml", "--out", "part").code == 0
    assert steps == list(range(6))
    one, two = (LanguageModel.from_pretrained(f"{name}/model") for name in ("whole", "part"))
    assert one.fingerprint == two.fingerprint
    logged = [json.loads(line) for line in Path("part/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert doctor._altered(Path("out")) == [] and (Path("out") / doctor.SUMS).is_file()
    assert LanguageModel.from_pretrained("out").generate("lamp", max_tokens=3).ids
