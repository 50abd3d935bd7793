"""``linstate bench ops``: a table for people, a line for programs, and what there is after Ctrl-C."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from linstate.bench import ops

SMALL = ("--heads", 1, "--size", 16, "--rounds", 1, "--only", "delta_rule, g per head")


def test_table_and_line(cli):
    done = cli("bench", "ops", "--tokens", "64,70", "--dtype", "float32", *SMALL)
    assert done.code == 0, done.err
    *table, line = done.out.splitlines()
    found = json.loads(line)
    text = "\n".join(table)
    assert "Gated DeltaNet: delta_rule, g per head, float32, K=V=16" in text and "torch.mm: float32" in text
    assert all(f"  {row['who']}" in text for row in found["rows"])
    assert "crossover with softmax attention: " in text
    assert {row["tokens"] for row in found["rows"]} == {64, 70} and found["machine"]["threads"] >= 1


def test_only_json_both_precisions_and_a_picture(cli):
    pytest.importorskip("matplotlib", reason="extra 'plot' is not installed")
    done = cli("bench", "ops", "--tokens", "64", "--json", "--plot", "ops.png", *SMALL)
    assert {row["dtype"] for row in done.json["rows"]} == {"float32", "bfloat16"}
    assert Path("ops.png").stat().st_size > 10_000 and "drawn in ops.png" in done.err


def test_steps_alone(cli, monkeypatch):
    monkeypatch.setattr("linstate.bench.steps.RING_BYTES", 2**16)
    done = cli("bench", "ops", "--step", "--tokens", "none", *SMALL)
    assert "batch 64" in done.out and "times those of copying the state" in done.out
    found = json.loads(done.out.splitlines()[-1])
    assert [step["batch"] for step in found["steps"] if step["who"] == "torch"] == [1, 8, 64]
    assert found["rows"] == []


def test_ctrl_c_prints_what_was_measured(cli, monkeypatch):
    real = ops.sweep

    def stopped(plan, rates):
        yield next(iter(real(plan, rates)))
        raise KeyboardInterrupt

    monkeypatch.setattr(ops, "sweep", stopped)
    done = cli("bench", "ops", "--tokens", "64,128", "--dtype", "float32", *SMALL)
    assert done.code == 130 and "stopped" in done.err
    rows = json.loads(done.out.splitlines()[-1])["rows"]
    assert rows and {row["tokens"] for row in rows} == {64}
    assert "softmax float32" in done.out


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--tokens", "64,x"), "--tokens takes lengths"),
        (("--tokens", "none"), "there is nothing to measure"),
        (("--dtype", "float16"), "--dtype takes float32 and bfloat16"),
        (("--only", "nothing"), "no case has 'nothing'"),
        (("--isa", "vax"), "instruction set 'vax'"),
        (("--plot", "no/such/folder.png"), "no folder no/such"),
        (("--cpu-time", "--threads", 2), "give --threads 1"),
        (("--device", "tpu"), "--device takes cpu or cuda"),
        (("--device", "cuda", "--dtype", "float32,bfloat16,float16"), "takes one of float32"),
    ],
)
def test_wrong_wishes(cli, options, error):
    before = torch.get_num_threads()
    assert error in cli("bench", "ops", *options).error
    assert torch.get_num_threads() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_message_says_so(cli):
    assert "torch sees none here" in cli("bench", "ops", "--device", "cuda").error


def test_whole_models_small_enough_for_a_test(cli, monkeypatch):
    from dataclasses import replace

    from linstate.bench import models

    case = models.CASES["mamba2-370m"]
    small = replace(
        case.config, vocab_size=64, d_model=64, num_layers=1, options={"mamba2": {"state_size": 16}}
    )
    monkeypatch.setitem(models.CASES, "mamba2-370m", replace(case, config=small))
    monkeypatch.setattr(models.Plan, "quick", lambda plan: replace(plan, prefill=(512,), tokens=2, rounds=1))
    asked = ("--models", "mamba2-370m", "--quick", "--no-peers", "--threads", 1)
    done = cli("bench", "model", *asked, model=None)
    assert done.code == 0, done.err
    *table, line = done.out.splitlines()
    (found,) = json.loads(line)["models"]
    assert set(found["prefill"]) == set(found["decode"]) == {"bf16", "int8", "int4"}
    # in_proj [2 * 128 + 2 * 16 + 2 of 64], out_proj [64 of 128], head, in panels of 32; the state and the convolution's tail.
    packed = 2 * (320 * 64 + 64 * 128 + 64 * 64)
    assert found["decode"]["bf16"]["bytes"] == packed + 4 * (2 * 16 * 64 + 3 * 160)
    assert "decode, int4" in "\n".join(table)


def test_models_and_formats_that_there_are_not(cli):
    assert "mamba2-370m" in cli("bench", "model", "--models", "gpt", model=None).error
    assert "bf16, int8 and int4" in cli("bench", "model", "--weights", "int2", model=None).error


def test_what_narrow_weights_cost(cli):
    Path("text.txt").write_text("a line of text, and another\n" * 20)
    found = cli("bench", "weights", "text.txt", "--json").json["weights"]
    assert list(found) == ["as stored", "bf16", "int8", "int4"]
    assert found["bf16"]["perplexity"] == pytest.approx(found["as stored"]["perplexity"], rel=0.02)
    assert found["int4"]["perplexity"] != found["as stored"]["perplexity"]
    assert "no.txt" in cli("bench", "weights", "no.txt").error
