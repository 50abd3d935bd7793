"""The demo, small: its five parts, and what it says about them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("matplotlib", reason="extra 'plot' is not installed")


@pytest.mark.slow
def test_demo(tmp_path):
    notes = tmp_path / "notes.txt"
    notes.write_text("hello\nlamp: green\ndoor: 12\n")
    command = [sys.executable, "-m", "linstate", "demo", "--json", "--bytes", "60000"]
    options = ["--plot", str(tmp_path / "d.png"), "--notes", str(notes)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert made["restore"] == {"tokens": 200, "identical": True, "seconds": made["restore"]["seconds"]}
    assert 15_000 < made["reading"]["tokens"] < 60_000
    assert made["state"]["kv_cache_bytes"] > 10 * made["state"]["file_bytes"]
    assert made["questions"]["asked"] == 2
    assert made["picture"]["position"] > 1000
    assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")
    assert "identical to the 200 tokens" in done.stderr and "lamp" in done.stderr
