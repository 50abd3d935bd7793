"""The help is there at once, names every command, and is what ``docs/help.md`` says."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from linstate import __version__
from linstate.cli import COMMANDS, app, docs

ROOT = Path(__file__).resolve().parents[2]


def test_help_and_version_come_without_torch(environment):
    code = (
        "import sys; from linstate.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: assert not {'torch', 'numpy', 'tokenizers', 'transformers'} & set(sys.modules)"
    )
    for argument, expected in (("--help", "doctor"), ("--version", f"linstate {__version__}")):
        child = subprocess.run(
            [sys.executable, "-c", code, argument],
            capture_output=True,
            text=True,
            env=environment,
            check=True,
        )
        assert expected in child.stdout


def test_help_names_every_command():
    shown = CliRunner().invoke(app, ["--help"]).output
    files = {path.stem for path in Path(docs.__file__).parent.glob("*.py")}
    helpers = {
        "__init__",
        "bench_cuda",
        "bench_model",
        "bench_model_cuda",
        "bench_states",
        "common",
        "docs",
        "reading",
        "sources",
    }
    assert files - helpers == set(COMMANDS), "a command's file must be in COMMANDS"
    assert all(f" {name} " in shown for name in COMMANDS)


def test_every_command_explains_itself():
    for command in docs.commands():
        shown = CliRunner().invoke(app, [*command.name.split()[1:], "--help"], env={"COLUMNS": "200"})
        assert shown.exit_code == 0
        assert len(command.paragraphs) >= 2, f"{command.name}: a line, then a paragraph"
        for parameter in docs.parameters(command.function):
            assert parameter.help.endswith("."), f"{command.name} {parameter.names}"
            assert not parameter.option or parameter.names[0].split("/")[0] in shown.output


def test_examples_are_command_lines_that_parse():
    for command in docs.commands():
        for line in command.examples:
            words = shlex.split(line.split("|")[-1])
            assert " ".join(words).startswith(command.name), line
            given = {name for p in docs.parameters(command.function) for name in p.names}
            assert {word for word in words if word.startswith("-") and word != "-"} <= given, line


def test_help_md_is_up_to_date():
    assert (ROOT / "docs/help.md").read_text("utf-8") == docs.text(), "run: python -m linstate.cli.docs"


def test_the_check_sees_a_difference(tmp_path, monkeypatch, capsys):
    page = tmp_path / "help.md"

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["docs", "--file", str(page), *arguments])
        return docs.main()

    assert run("--check") == 1 and not page.exists()
    assert run() == 0 and run("--check") == 0
    page.write_text(page.read_text("utf-8") + "x", "utf-8")
    assert run("--check") == 1 and "is not what the command line says" in capsys.readouterr().err
