"""``linstate bench patch``: a table for people, a line for programs; theirs loses its state, ours does not."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers", reason="extra 'hf' is not installed")

from linstate.bench import patched

SMALL = {"hidden_size": 32, "num_hidden_layers": 1}


def test_table_and_line(cli, monkeypatch):
    monkeypatch.setattr(
        patched, "MODELS", {name: (patched.MODELS[name][0], SMALL) for name in ("mamba", "mamba2")}
    )
    monkeypatch.setitem(
        patched.MODELS, "mamba2", ("Mamba2Config", {**SMALL, "num_heads": 8, "head_dim": 8, "n_groups": 1})
    )
    done = cli("bench", "patch", "--tokens", "40", "--rounds", "1")
    assert done.code == 0, done.err
    *table, line = done.out.splitlines()
    assert "mamba2" in "\n".join(table) and "pieces off" in table[0]
    found = {row["family"]: row for row in json.loads(line)["families"]}
    assert found["mamba"]["pieces"][0] > 1e-3 > 1e-4 > found["mamba"]["pieces"][1]
    assert max(found["mamba2"]["pieces"]) < 1e-4
    for row in found.values():
        assert row["same"] < 1e-4 and min(*row["prefill"], *row["step"]) > 0


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--only", "llama"], "no model of the family 'llama'"),
        (["--dtype", "float32,bfloat16"], "takes one precision"),
        (["--dtype", "float9"], "--dtype takes"),
        (["--cpu-time", "--threads", "2"], "give --threads 1"),
    ],
)
def test_what_cannot_be_measured(cli, options, error):
    done = cli("bench", "patch", *options)
    assert done.code != 0 and error in done.err
