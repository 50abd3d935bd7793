"""``bench ops --device cuda`` with Triton's interpreter in the place of a GPU: every cell is measured, launches are counted."""

from __future__ import annotations

import pytest
import torch

from bench.processor import Processor
from linstate.bench import cuda
from linstate.bench.cases import CASES
from linstate.bench.gpu import Rates
from ops.triton_process import DEVICE, serves

pytestmark = [serves, pytest.mark.skipif(DEVICE != "cpu", reason="of the interpreter")]
LAUNCHES = {"forward": 2, "training": 4, "step": 1}
OF_SCAN = {"forward": 1, "training": 2, "step": 1}


@pytest.mark.parametrize(
    "name",
    [
        "delta_rule, g per head",
        "linear_attention, g per head",
        "selective_scan, K = 16",
        "causal_conv1d, W = 4, SiLU",
    ],
)
def test_cells(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "FLA", {})
    monkeypatch.setattr(cuda, "STATES", 3)
    plan = cuda.Plan(
        tokens=(5,), sizes=((1, 1),), size=16, dtype=torch.float32, rounds=1, only=name, cold=False
    )
    gpu, captured = Processor(), 3  # triton, torch and the copy, of steps
    for rows in cuda.sweep(plan, Rates(1e9, 1e12), gpu):
        found = {row.who: row for row in rows}
        mode = found["triton"].mode
        by_token = CASES[name].recurrence in ("selective_scan", "causal_conv1d")
        assert found["triton"].launches == (OF_SCAN if by_token else LAUNCHES)[mode], found["triton"].reason
        for who in ("triton", "torch", "copy"):
            assert found[who].ms and found[who].of_bandwidth and found[who].reason is None
            assert (found[who].graph_ms is not None) == (mode == "forward")
        captured += sum(row.graph_ms is not None for row in rows)
    assert gpu.graphs == captured
