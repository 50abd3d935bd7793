"""What the README shows is what there is: its table of architectures, and its ten lines of Python."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path

from linstate.cli import mixers, models

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def between(name: str) -> str:
    text = (ROOT / "docs" / "models.md").read_text("utf-8")
    found = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", text, re.DOTALL)
    assert found, f"docs/models.md has no part between <!-- {name} --> and <!-- /{name} -->"
    return found[1]


def test_it_is_a_landing_page():
    assert len(README.splitlines()) <= 120


def test_the_table_of_architectures_is_up_to_date():
    found = mixers.as_markdown(mixers.table_of_all())
    assert between("mixers") == found, "put the output of: linstate mixers --markdown"


def test_the_table_of_models_is_up_to_date():
    found = models.as_markdown(models.table_of_all())
    assert between("models") == found, "put the output of: linstate models --markdown"


def test_the_python_lines_print_what_their_comments_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert code
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(code[1], "README.md", "exec"), {})
    promised = re.findall(r"^print\(.*\)  # (.*)$", code[1], re.MULTILINE)
    assert said.getvalue().splitlines() == promised and len(promised) == 3
    assert round((tmp_path / "trip.state").stat().st_size / 1000) == 13  # as the comment says


def test_the_figures_at_a_glance_are_those_that_were_measured():
    measured = json.loads((ROOT / "docs" / "measured" / "models.json").read_text("utf-8"))
    for model in measured["models"]:
        row = next(line for line in README.splitlines() if line.startswith(f"| {model['name']} |"))
        read = model["prefill of 2,048 tokens"]
        narrow, plain = model["decode, 4 bits"], model["decode, bf16"]
        _, _, prefill, decode, _ = (cell.strip() for cell in row.split("|"))
        assert prefill == f"{read['Linstate'] / read['llama.cpp']:.1f}x"
        assert decode.split(" / ")[0] == f"{plain['Linstate'] / plain['llama.cpp']:.1f}"
        assert decode.split(" / ")[2] == f"{narrow['Linstate'] / narrow['llama.cpp']:.1f}x"


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / target).exists(), target
