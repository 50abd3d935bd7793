"""A small random model in a folder, and a way to run command lines in this process, each test in a folder of its own."""

from __future__ import annotations

import io
import json
import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from linstate.cli import main
from small_models import build


@dataclass(frozen=True)
class Result:
    """What a command line left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one line of an error; fails if there is more, or less."""
        assert self.code == 1, self
        (line,) = [line for line in self.err.splitlines() if not line.startswith("note: ")]
        assert line.startswith("error: ") and "Traceback" not in self.err
        return line.removeprefix("error: ")


class Pipe(io.TextIOWrapper):
    """A standard stream that is no terminal and stays open."""

    def __init__(self, content: bytes = b"") -> None:
        super().__init__(io.BytesIO(content), encoding="utf-8", write_through=True)

    def text(self) -> str:
        return self.buffer.getvalue().decode()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models ``tiny`` and ``other``: the same, with other weights."""
    folder = tmp_path_factory.mktemp("models")
    build("delta").save_pretrained(folder / "tiny")
    build("delta", seed=1).save_pretrained(folder / "other")
    return folder


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing of the person who runs the tests is read or written."""
    monkeypatch.chdir(tmp_path)
    for name in ("HOME", "USERPROFILE", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    return tmp_path


@pytest.fixture
def cli(models: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run ``linstate`` as its entry point does; commands that take a model get the small one."""

    def run(*arguments: object, stdin: str | bytes = b"", model: str | None = "tiny") -> Result:
        line = [str(argument) for argument in arguments]
        if model is not None and (
            line[0] in {"read", "ask", "chat", "generate", "compose", "info", "find"}
            or line[:2] == ["store", "add"]
        ):
            line += ["--model", str(models / model)]
        out, err = Pipe(), Pipe()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", Pipe(stdin.encode() if isinstance(stdin, str) else stdin))
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            with pytest.raises(SystemExit) as ended:
                main(line)
        code = ended.value.code
        return Result(code if isinstance(code, int) else 0 if code is None else 1, out.text(), err.text())

    return run


@pytest.fixture
def environment() -> dict[str, str]:
    """For subprocesses: one thread, and this package wherever it comes from."""
    paths = [path for path in sys.path if path]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}


def prose(size: int, seed: int = 0) -> str:
    """Made-up text of ``size`` characters with words, lines, figures and letters of two and three bytes."""
    rng = random.Random(seed)
    words = [
        "the red lamp has number",
        "entry",
        "grün",
        "stone; keep it.",
        "key: value",
        "\tx = 7",
        "€5",
        "don't",
        "\n\n",
    ]
    text = ""
    while len(text) < size:
        text += rng.choice(words) + rng.choice([" ", " ", " ", "\n"])
    return text[:size]
