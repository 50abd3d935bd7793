"""``compare``: what it keeps, shows and refuses, on the parts that take no time."""

from __future__ import annotations

import json
from pathlib import Path


def test_compare_keeps_shows_and_goes_on(cli):
    line = ("compare", "--only", "cost", "--mixers", "deltanet,gla", "--json", "c.json")
    done = cli(*line, "--report", "r.md", "--plots", "pictures")
    assert done.code == 0, done.err
    assert "deltanet" in done.out and "State and work" in done.out
    kept = json.loads(Path("c.json").read_text())
    assert set(kept["results"]) == {"cost/attention", "cost/deltanet", "cost/gla"}
    assert kept["machine"]["versions"]["torch"] and kept["command"].endswith(
        "--mixers attention,deltanet,gla"
    )
    assert Path("pictures/cost.png").stat().st_size > 10_000
    assert "](r/cost.png)" in Path("r.md").read_text() and Path("r/cost.png").is_file()
    assert "c.json exists" in cli(*line).error
    again = cli("compare", "--resume", "--json", "c.json")
    assert again.code == 0 and again.out == done.out
    assert (
        "measured by another command"
        in cli("compare", "--only", "speed", "--resume", "--json", "c.json").error
    )


def test_compare_says_what_is_wrong(cli):
    assert "--resume needs --json" in cli("compare", "--resume").error
    assert "one of --quick and --full" in cli("compare", "--quick", "--full").error
    assert "there is no section 'b'" in cli("compare", "--only", "b").error
    assert "there is no mixer 'softmax'" in cli("compare", "--mixers", "softmax").error


def test_mixers_long_says_what_was_measured(cli):
    (attention,) = [part for part in cli("mixers", "--long").out.split("\n\n") if "Vaswani" in part]
    assert "FLOPs" in attention and "weights" in attention and "state grows to" in attention
