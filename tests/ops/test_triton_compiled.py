"""Triton's programs are compiled ahead of time for an H100, where there is no GPU: they compile, and fit into its shared memory.

In a process of its own: this one may be one where Triton interprets, or that has set Triton's caches up already.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from linstate.ops.triton import runtime

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(runtime.missing() is not None, reason=str(runtime.missing())),
]
SHARED = 227 * 1024
"""Bytes that one program may have on an H100."""


@pytest.mark.parametrize(
    "name",
    ["delta_rule, gate 1", "selective_scan", "causal_conv1d", "step", "mixer gated_deltanet"],
)
def test_it_compiles_and_fits(name: str, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "linstate.ops.triton.ahead", "--only", name, "--size", "64", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert found
    for program in found:
        assert program["shared"] <= SHARED and 0 < program["registers"] <= 255, program


@pytest.mark.parametrize(
    ("kind", "gate", "every"), [(0, 2, 32), (1, 1, 32), (1, 2, 16), (2, 2, 32), (1, 1, 0)]
)
def test_what_is_compiled_is_right(kind: int, gate: int, every: int, tmp_path: Path) -> None:
    """The compiler's output itself, executed on the CPU; the last case with gradients. Triton's interpreter cannot show what the compiler makes of a program:
    a pair of variables handed on in a loop (``x, y = y, z``) was once compiled as a constant, which failed on a GPU alone."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("execute_compiled.py")
    command = [sys.executable, str(script), *map(str, (kind, gate, every))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found) == (2 if every else 8)
    assert all(error <= 1e-2 for error in found.values()), found
