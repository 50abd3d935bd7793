"""The Triton programs: what can be said without running them, and their tests under Triton's interpreter, in processes of their own.

Whether Triton interprets is settled when it is first imported, and in this process others may have imported it. On a machine with a
GPU the same tests run in this process, on the GPU.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from laws.op_cases import Sizes, cases, kernel, refusal
from linstate.ops.triton import runtime, table

INTERPRETED = sorted(file.name for file in Path(__file__).parent.glob("test_triton_*_programs.py"))
CPU = pytest.mark.skipif(runtime.missing() is not None, reason=str(runtime.missing()))


@CPU
@pytest.mark.parametrize("file", INTERPRETED)
def test_under_the_interpreter(file: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(Path(__file__).with_name(file)),
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    assert re.search(r"^\d+ passed", done.stdout, re.MULTILINE), done.stdout[-2000:]


def test_there_are_programs_to_test() -> None:
    assert len(INTERPRETED) >= 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "name", ["linear_attention", "delta_rule", "dplr", "selective_scan", "causal_conv1d"]
)
def test_a_refusal_says_why(name: str) -> None:
    for form, tokens in (("chunked", 3), ("step", 1)):
        case = cases(name, Sizes(T=tokens))[0].to(torch.float32)
        why = refusal(kernel(name, form, "triton"), case)
        assert why is not None and (
            "Triton is not installed" in why or "TRITON_INTERPRET=1 is not set" in why
        )


@pytest.mark.parametrize("tokens", [1, 63, 512, 1023, 1024, 8192, 65_537, 1_000_000])
@pytest.mark.parametrize("programs", [1, 16, 64, 131, 132, 4096])
def test_segments_cover_a_text_and_fill_a_chip(programs: int, tokens: int) -> None:
    count, length = table.segments(programs, tokens, 132, 64)
    assert length % 64 == 0 and (count - 1) * length < tokens <= count * length
    if programs >= 132:
        assert count == 1
    elif tokens >= 132 * table.SEGMENT:
        assert programs * count >= 132


@pytest.mark.parametrize("size", [1, 16, 17, 64, 100, 128, 256])
@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("gate", [0, 1, 2])
@pytest.mark.parametrize("wide", [False, True])
def test_configurations_are_what_matmuls_take(kind: int, gate: int, size: int, wide: bool) -> None:
    first = table.forward(kind, gate, size, size, wide)
    sweep, gradients = table.backward(kind, gate, size, size, wide)
    before = table.prepare(kind, gate, size, wide)
    assert before.block >= 16 and before.warps in (1, 2, 4, 8)
    for config in (first, sweep, gradients):
        assert config.chunk >= 16 and config.block >= 16 and config.warps in (4, 8)
        assert config.chunk & (config.chunk - 1) == 0 and config.block & (config.block - 1) == 0
        assert table.padded(size) * config.block <= table.TILE
    assert sweep.chunk == gradients.chunk and 32 % sweep.chunk == 0 and 64 % first.chunk == 0
