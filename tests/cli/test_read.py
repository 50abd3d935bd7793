"""``linstate read``: what is read, where it goes, and that a stopped reading ends up where an uninterrupted one does."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cli.conftest import prose
from linstate import LanguageModel, State
from linstate.cli import sources
from linstate.engine.reader import Reader


def load(path: str | Path) -> State:
    return State.load(path)


def partial(path: str | Path) -> dict:
    return json.loads(load(path).notes["sources"])["partial"]


def test_a_file_is_read_as_the_library_reads_it(cli, models):
    text = prose(3000)
    Path("notes.txt").write_text(text, "utf-8")
    done = cli("read", "notes.txt", "--title", "mine", "--json")
    assert done.code == 0
    state, whole = load("notes.state"), LanguageModel.from_pretrained(models / "tiny").read(text)
    assert (done.json["state"], done.json["id"], done.json["tokens"]) == (
        "notes.state",
        whole.id,
        whole.position,
    )
    assert state.id == whole.id and state.notes["title"] == "mine"
    (file,) = json.loads(state.notes["sources"])["files"]
    assert (file["name"], file["bytes"]) == ("notes.txt", len(text.encode()))
    assert done.json["bytes"] == len(text.encode())


def test_people_get_a_line_on_standard_error(cli):
    Path("a.txt").write_text(prose(500))
    done = cli("read", "a.txt")
    assert done.out == "" and done.err.startswith("a.state: ") and "tokens/s" in done.err


def test_folders_are_read_sorted_without_hidden_and_binary_files(cli):
    for name, content in {
        "b/2.txt": b"two",
        "b/1.txt": b"one",
        "a.txt": b"first",
        ".git/x": b"no",
        "b/.h": b"no",
    }.items():
        path = Path("docs", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    Path("docs/picture.png").write_bytes(b"\x89PNG\0\0")
    done = cli("read", "docs", "--json")
    names = [Path(f["name"]).as_posix() for f in json.loads(load("docs.state").notes["sources"])["files"]]
    assert names == ["docs/a.txt", "docs/b/1.txt", "docs/b/2.txt"]
    assert "skipped" in done.err and "picture.png" in done.json["skipped"][0]
    Path("joined.txt").write_text("first\n\none\n\ntwo")
    assert cli("read", "joined.txt", "--json").json["id"] == done.json["id"]


def test_reading_two_files_is_reading_one_and_then_the_other(cli):
    Path("a.txt").write_text(prose(900))
    Path("b.txt").write_text(prose(1100, seed=1))
    both = cli("read", "a.txt", "b.txt", "-o", "both.state", "--json")
    first = cli("read", "a.txt", "-o", "x.state", "--json")
    then = cli("read", "b.txt", "--state", "x.state", "--json")
    assert both.json["id"] == then.json["id"] == load("x.state").id != first.json["id"]
    assert load("x.state").lineage == (first.json["id"],)
    assert [f["name"] for f in json.loads(load("x.state").notes["sources"])["files"]] == ["a.txt", "b.txt"]


def test_standard_input(cli, models):
    text = prose(2000)
    done = cli("read", "-", "--json", stdin=text)
    assert done.json["state"] == "stdin.state"
    assert done.json["id"] == LanguageModel.from_pretrained(models / "tiny").read(text).id


def test_bytes_that_are_no_text_and_marks_at_the_start(cli, models):
    Path("odd.txt").write_bytes(b"\xef\xbb\xbfgr\xfcn caf\xc3\xa9 \xe2\x82 end \xf0\x9f")
    done = cli("read", "odd.txt", "--json")
    text = "gr\ufffdn café \ufffd\ufffd end \ufffd\ufffd"
    assert done.json["id"] == LanguageModel.from_pretrained(models / "tiny").read(text).id
    assert done.json["undecodable_bytes"] == 5 and "no UTF-8" in done.err


def test_memory_does_not_hold_the_file(cli, monkeypatch):
    Path("big.txt").write_text("one two three\n" * 40_000)
    longest = 0
    seen = sources.chunks

    def chunks(file, waiting):
        nonlocal longest
        for chunk in seen(file, waiting):
            longest = max(longest, len(chunk))
            yield chunk

    monkeypatch.setattr(sources, "chunks", chunks)
    monkeypatch.setattr(Reader, "run_block", lambda self: self.tail.__delitem__(slice(self.grid)))
    assert cli("read", "big.txt", "--json").code == 0
    assert 0 < longest <= 1 << 16


def test_an_existing_state_is_not_overwritten(cli):
    Path("a.txt").write_text("some words")
    assert cli("read", "a.txt").code == 0
    before = Path("a.state").read_bytes()
    error = cli("read", "a.txt").error
    assert "a.state exists" in error and "--state a.state" in error and "--force" in error
    assert Path("a.state").read_bytes() == before
    assert cli("read", "a.txt", "--force").code == 0
    assert cli("read", "a.txt", "-o", "a.state", "--state", "a.state").code == 0


def test_kept_tokens_and_precision(cli):
    Path("a.txt").write_text(prose(2000))
    done = cli("read", "a.txt", "--keep-tokens", "--precision", "int8", "--json")
    state = load("a.state")
    assert (
        len(state.tokens) == done.json["tokens"] and state.precision == "int8" and state.precision_error > 0
    )
    cli("read", "a.txt", "-o", "b.state")
    assert "--keep-tokens" in cli("read", "a.txt", "--state", "b.state", "--keep-tokens").error
    assert cli("read", "a.txt", "-o", "c.state", "--precision", "int8").code == 0
    assert Path("c.state").stat().st_size < Path("b.state").stat().st_size


# Interrupted readings


@pytest.fixture
def stop_after(monkeypatch):
    """Ctrl-C in the middle of a model call, after so many blocks."""

    def arm(blocks: int, number: int = signal.SIGINT) -> None:
        left, run = blocks, Reader.run_block

        def run_block(self):
            nonlocal left
            left -= 1
            if left == 0:
                signal.raise_signal(number)
            run(self)

        monkeypatch.setattr(Reader, "run_block", run_block)

    return arm


@pytest.mark.parametrize("blocks", [1, 2, 11, 18, 30])
def test_a_stopped_reading_goes_on_to_the_same_state(cli, stop_after, blocks, monkeypatch):
    """Stops fall into the first piece of a file, between pieces, into the second file."""
    monkeypatch.setattr("linstate.engine.tokens._PIECE", 2500)
    odd = prose(9000).encode() + b"\xff\xfe" + "é".encode() + prose(6000, seed=2).encode()
    Path("a.txt").write_bytes(odd)
    Path("b.txt").write_text(prose(9000, seed=1))
    Path("empty.txt").touch()
    names = ["a.txt", "empty.txt", "b.txt"]
    whole = cli("read", *names, "-o", "whole.state", "--json").json
    assert whole["tokens"] // 256 > 30
    stop_after(blocks)
    stopped = cli("read", *names, "-o", "part.state", "--title", "t")
    stop_after(10**9)
    assert stopped.code == 130
    where = partial("part.state")
    assert load("part.state").position == 256 * blocks + len(load("part.state").tail) < whole["position"]
    assert f"byte {where['at']:,}" in stopped.err
    line = shlex.split(stopped.err.split("to go on:")[1])
    assert line[:2] == ["linstate", "read"] and line[-2:] == ["--state", "part.state"]
    done = cli(*line[1:-4], *line[-2:], "--json")
    assert done.code == 0 and done.json["resumed"]
    assert (done.json["id"], done.json["position"]) == (whole["id"], whole["position"])
    one, two = load("whole.state"), load("part.state")
    assert one.lineage == two.lineage and two.notes["title"] == "t"
    assert one.notes["sources"] == two.notes["sources"]


def test_it_may_be_stopped_many_times(cli, stop_after):
    Path("a.txt").write_text(prose(15_000))
    whole = cli("read", "a.txt", "-o", "whole.state", "--json").json["id"]
    stop_after(3, signal.SIGTERM)
    assert cli("read", "a.txt").code == 143
    for _ in range(3):
        stop_after(5)
        assert cli("read", "a.txt", "--state", "a.state").code == 130
    stop_after(10**9)
    assert cli("read", "a.txt", "--state", "a.state", "--json").json["id"] == whole


def test_a_stopped_reading_is_exact_whatever_the_precision(cli, stop_after):
    Path("a.txt").write_text(prose(9000))
    whole = cli("read", "a.txt", "-o", "whole.state", "--precision", "bf16")
    stop_after(4)
    stopped = cli("read", "a.txt", "--precision", "bf16")
    assert "--precision bf16" in stopped.err and load("a.state").precision == "exact"
    stop_after(10**9)
    assert cli("read", "a.txt", "--state", "a.state", "--precision", "bf16").code == whole.code == 0
    assert load("a.state").id == load("whole.state").id


def test_other_sources_are_not_taken_for_the_interrupted_ones(cli, stop_after, monkeypatch):
    monkeypatch.setattr("linstate.engine.tokens._PIECE", 1000)
    Path("a.txt").write_text(prose(1500))
    Path("b.txt").write_text(prose(6000, seed=1))
    Path("c.txt").write_text(prose(900, seed=2))
    stop_after(7)
    assert cli("read", "a.txt", "b.txt", "-o", "x.state").code == 130
    stop_after(10**9)
    assert "b.txt (source 2" in cli("read", "c.txt", "--state", "x.state").error
    assert "not those that it has read" in cli("read", "c.txt", "b.txt", "--state", "x.state").error
    assert "source 2 is now c.txt" in cli("read", "a.txt", "c.txt", "--state", "x.state").error
    before = Path("x.state").read_bytes()
    text = Path("b.txt").read_text()
    where = partial("x.state")
    assert where["at"] > 100 and where["skip"] > 0
    for byte in (0, where["at"] + 1):  # before the piece in which it stopped, and in it
        Path("b.txt").write_text(text[:byte] + "X" + text[byte + 1 :])
        assert "b.txt is not what it was" in cli("read", "a.txt", "b.txt", "--state", "x.state").error
    assert Path("x.state").read_bytes() == before
    assert cli("read", "c.txt", "--state", "x.state", "--abandon").code == 0
    assert "partial" not in json.loads(load("x.state").notes["sources"])


def test_a_source_that_fails_half_way_leaves_a_state_to_go_on_from(cli, monkeypatch):
    Path("a.txt").write_text(prose(200_000))
    seen = sources.chunks

    def chunks(file, waiting):
        yield next(chunk := seen(file, waiting))
        yield next(chunk)
        yield next(chunk)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Reader, "run_block", lambda self: self.tail.__delitem__(slice(self.grid)))
    with monkeypatch.context() as patch:
        patch.setattr(sources, "chunks", chunks)
        failed = cli("read", "a.txt")
    assert failed.code == 1 and "error: cannot read on in a.txt: Input/output error" in failed.err
    assert partial("a.state")["at"] > 0 and partial("a.state")["skip"] == 0
    text = Path("a.txt").read_text()
    Path("a.txt").write_text("X" + text[1:])
    assert "a.txt is not what it was" in cli("read", "a.txt", "--state", "a.state").error
    Path("a.txt").write_text(text)
    assert cli("read", "a.txt", "--state", "a.state").code == 0


@pytest.mark.skipif(sys.platform != "linux", reason="a named pipe of known size")
def test_ctrl_c_in_another_process(cli, models, environment, monkeypatch):
    """A real process that has read some of a pipe is interrupted; a file of that name then takes its place."""
    monkeypatch.setattr("linstate.engine.tokens._PIECE", 5000)
    text = prose(40_000)
    whole = cli("read", "-", "-o", "whole.state", "--json", stdin=text).json["id"]
    os.mkfifo("log.txt")
    code = "from linstate.engine import tokens; tokens._PIECE = 5000; from linstate.cli import main; main()"
    command = [
        sys.executable,
        "-c",
        code,
        "read",
        "log.txt",
        "-o",
        "log.state",
        "--model",
        str(models / "tiny"),
    ]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    data = text.encode()
    with open("log.txt", "wb", buffering=0) as pipe:  # waits until the child has opened it, its handlers set
        import fcntl

        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 4096)  # so all that is written was read, but for this much
        sent = 0
        while sent < len(data) - 3000:
            sent += os.write(pipe.fileno(), data[sent : min(sent + 4096, len(data) - 3000)])
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
    assert child.returncode == 130 and "to go on:" in err, err
    Path("log.txt").unlink()
    Path("log.txt").write_bytes(data)
    done = cli("read", "log.txt", "--state", "log.state", "--json")
    assert done.json["resumed"] and done.json["id"] == whole
