"""``linstate bench ops``: a table for people, a line for programs, and what there is after Ctrl-C."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from linstate.bench import model_cases, ops
from small_models import small_case

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
    for what in ("ops", "model"):
        assert "torch sees none here" in cli("bench", what, "--device", "cuda").error


def test_whole_models_small_enough_for_a_test(cli, monkeypatch):
    monkeypatch.setattr("linstate.bench.models.LONGEST", 512)
    monkeypatch.setitem(model_cases.CASES, "mamba2-370m", small_case("mamba2-370m"))
    monkeypatch.setitem(model_cases.CASES, "qwen3.5-0.8b", small_case("qwen3.5-0.8b"))
    asked = ("--models", "mamba2-370m,qwen3.5-0.8b", "--lengths", "600,512,256", "--rounds", 1, "--tokens", 2)
    done = cli("bench", "model", *asked, "--peers", "none", "--threads", 1, model=None)
    assert done.code == 0, done.err
    *table, line = done.out.splitlines()
    mamba2, qwen = json.loads(line)["models"]
    assert list(mamba2["prefill"]["bf16"]) == ["256", "512", "600"]  # all lengths in the first format
    assert list(qwen["prefill"]["bf16"]) == ["256", "512"]  # a growing cache: no longer than LONGEST
    assert list(mamba2["prefill"]["int4"]) == ["256"] and set(mamba2["decode"]) == {"bf16", "int8", "int4"}
    assert mamba2["resumed"]["tokens"] == 512 and mamba2["prefill"]["bf16"]["600"]["resident"] > 2**20
    # in_proj [2 * 128 + 2 * 128 + 2 of 64], out_proj [64 of 128], head, in panels of 32; the state and the convolution's tail.
    packed = 2 * 2 * (544 * 64 + 64 * 128) + 2 * 512 * 64
    assert mamba2["decode"]["bf16"]["bytes"] == packed + 2 * 4 * (2 * 128 * 64 + 3 * 384)
    text = "\n".join(table)
    assert "decode, int4" in text and "prefill 600, bf16" in text
    assert "first token of a conversation of 512 tokens" in text


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--models", "gpt"), "mamba2-370m"),
        (("--weights", "int2"), "bf16, int8 and int4"),
        (("--lengths", "2048,long"), "--lengths takes numbers of tokens"),
        (("--peers", "vllm"), "--peers takes transformers and llama.cpp"),
        (("--llama-cpp", "."), "has no convert_hf_to_gguf.py"),
        (("--cpu-time", "--threads", 2), "give --threads 1"),
    ],
)
def test_models_formats_and_peers_that_there_are_not(cli, options, error):
    assert error in cli("bench", "model", *options, model=None).error


def test_what_narrow_weights_cost(cli):
    Path("text.txt").write_text("a line of text, and another\n" * 20)
    found = cli("bench", "weights", "text.txt", "--json").json["weights"]
    assert list(found) == ["as stored", "bf16", "int8", "int4"]
    assert found["bf16"]["perplexity"] == pytest.approx(found["as stored"]["perplexity"], rel=0.02)
    assert found["int4"]["perplexity"] != found["as stored"]["perplexity"]
    assert "no.txt" in cli("bench", "weights", "no.txt").error
