"""What the README shows is what there is: its table of architectures, and its ten lines of Python."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

from linstate import LanguageModel
from linstate.cli import mixers, models

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")


def between(name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", README, re.DOTALL)
    assert found, f"README.md has no part between <!-- {name} --> and <!-- /{name} -->"
    return found[1]


def test_the_table_of_architectures_is_up_to_date():
    found = mixers.as_markdown(mixers.table_of_all())
    assert between("mixers") == found, "put the output of: linstate mixers --markdown"


def test_the_table_of_models_is_up_to_date():
    found = models.as_markdown(models.table_of_all())
    assert between("models") == found, "put the output of: linstate models --markdown"


def test_the_python_lines_run_and_say_what_their_comments_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert code
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(code[1], "README.md", "exec"), {})
    state = LanguageModel.from_pretrained("pocket").decoder.state_bytes(0)
    assert 12_500 < (tmp_path / "trip.state").stat().st_size < 13_500 and 1.005 * state < 9_700_000
    assert len(said.getvalue().splitlines()) == 3


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (Path(__file__).parent.parent / target).exists(), target
