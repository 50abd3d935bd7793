"""What goes wrong is one line on standard error, and no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cli.conftest import prose


@pytest.fixture
def state(cli):
    Path("a.txt").write_text(prose(400))
    assert cli("read", "a.txt").code == 0
    return Path("a.state")


def test_missing_things(cli, state):
    assert "no-such.txt: No such file" in cli("read", "no-such.txt").error
    assert "cannot read the state none.state" in cli("ask", "none.state", "x").error
    assert "cannot read the questions in none.txt" in cli("ask", state, "--file", "none.txt").error
    assert "there is no model folder" in cli("ask", state, "x", "--model", "nowhere", model=None).error
    assert "there is no folder nowhere" in cli("read", "a.txt", "-o", "nowhere/x.state").error
    assert "it is a folder" in cli("read", "a.txt", "-o", ".").error
    assert "cannot read the recipe none.toml" in cli("train", "none.toml", "--out", "x").error
    Path("empty").mkdir()
    assert "nothing to read" in cli("read", "empty").error


def test_an_incomplete_model_folder(cli, state, models):
    Path("m").mkdir()
    assert "no config.json" in cli("ask", state, "x", "--model", "m", model=None).error
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        Path("m", name).write_bytes((models / "tiny" / name).read_bytes())
    Path("m/model.safetensors").write_bytes((models / "tiny/model.safetensors").read_bytes()[:5000])
    assert "m/model.safetensors cannot be read" in cli("info", "m", model=None).error


def test_broken_states(cli, state):
    whole = state.read_bytes()
    for name, content in {
        "cut": whole[:-100],
        "flipped": whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:],
        "text": b"this is no state at all, only some text",
        "empty": b"",
    }.items():
        Path(name).write_bytes(content)
        for line in (
            ["info", name],
            ["ask", name, "x"],
            ["fork", name, "-o", "f.state"],
            ["read", "a.txt", "--state", name],
        ):
            assert name in cli(*line).error
    assert not Path("f.state").exists()


def test_a_state_of_another_model(cli, state):
    error = cli("ask", state, "x", model="other").error
    assert "weights differ" in error or "weights differ" in error.replace(" and ", " ")
    assert "load that model" in error


def test_wrong_usage_is_exit_code_2(cli):
    for line in (
        ["read"],
        ["nonsense"],
        ["read", "x", "--no-such-option"],
        ["fork", "x"],
        ["read", "x", "--precision", "fp4"],
    ):
        done = cli(*line, model=None)
        assert done.code == 2 and done.out == "" and "Traceback" not in done.err


def test_a_full_disk_is_one_line(cli, monkeypatch):
    Path("a.txt").write_text("words")

    def full(*_, **__):
        raise OSError(28, "No space left on device", "a.state")

    monkeypatch.setattr("linstate.state.state.State.save", full)
    assert cli("read", "a.txt").error == "No space left on device: a.state"


def test_ctrl_c_elsewhere_is_exit_code_130(cli, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("linstate.cli.common.load_model", stop)
    Path("a.txt").write_text("words")
    done = cli("read", "a.txt")
    assert done.code == 130 and "Traceback" not in done.err


@pytest.mark.skipif(os.name != "posix", reason="pipes")
def test_a_reader_that_has_had_enough_is_no_error(environment):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as out:
        child = subprocess.run(
            [sys.executable, "-m", "linstate", "--help"],
            stdout=out,
            stderr=subprocess.PIPE,
            env=environment,
            check=False,
        )
    assert child.stderr == b""
