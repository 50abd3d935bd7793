"""The benchmarks of GPUs where there is none: their order, their peers' signatures, whole models with a processor in the GPU's place."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.processor import Processor
from linstate.bench import cuda, models_cuda
from linstate.bench.cases import CASES, Shape
from linstate.bench.gpu import Rates, in_turn, rates
from linstate.cli.bench_cuda import _table
from linstate.cli.bench_model_cuda import show
from oracles.fla_layers import fla_module
from small_models import small_case

RATES = Rates(bytes=1e9, flops=1e12)


class Counted(Processor):
    """Its clock is how much was called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def milliseconds(self, run: Any) -> float:
        run()
        return float(len(self.calls))


def test_turns_alternate_behind_calls_that_do_not_count() -> None:
    gpu = Counted()
    timed = in_turn(gpu, {name: lambda name=name: gpu.calls.append(name) for name in "ab"}, rounds=3)
    assert "".join(gpu.calls) == "aaabbb" + "ab" + "ba" + "ab"
    assert timed == {"a": 10.0, "b": 9.0}  # medians of 7, 10, 11 and of 8, 9, 12


def test_rates_are_of_a_copy_and_a_matmul() -> None:
    found = rates(Processor(), torch.float32, size=64, copied=1 << 16)
    assert found.bytes > 0 and found.flops > 0


@pytest.mark.parametrize("model", cuda.FLA)
def test_calls_of_fla_are_those_it_has(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every argument by a name of the function of the installed version; nothing is run."""
    (case,) = (case for case in CASES.values() if case.model == model)
    asked: list[dict[str, Any]] = []

    def imported(path: str) -> Any:
        module = fla_module(path.removeprefix("fla."))

        class Functions:
            def __getattr__(self, name: str) -> Any:
                signature = inspect.signature(getattr(module, name))

                def call(*args: Any, **kwargs: Any) -> None:
                    asked.append(dict(signature.bind(*args, **kwargs).arguments))

                return call

        return Functions()

    monkeypatch.setattr(cuda, "importlib", SimpleNamespace(import_module=imported))
    for mode, tokens in (("forward", 3), ("step", 1)):
        shape = Shape(tokens, 2, 8, torch.float32)
        inputs, state = case.inputs(shape), cuda.begin_state(case, shape) if mode == "step" else None
        dict(cuda.implementations(case, inputs, mode, state))["fla"]()()
    assert len(asked) == 2 and asked[0]["output_final_state"] is True
    assert asked[0]["initial_state"] is None and asked[1]["initial_state"].shape == (1, 2, 8, 8)


@pytest.mark.parametrize("name", ["mamba2-370m", "qwen3.5-0.8b", "rwkv7-0.4b"])
def test_whole_models(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    case, gpu = small_case(name), Processor()
    peers = name == "mamba2-370m"
    plan = models_cuda.Plan(
        prefill=(16,), batches=(1, 2), training=(8,), read=8, rounds=1, peers=peers, cold=False
    )
    rows = list(models_cuda.measure(case, plan, RATES, gpu))
    ours = [row for row in rows if row.who.startswith("linstate")]
    assert [(row.mode, row.batch) for row in ours if row.who == "linstate"] == [
        *(("prefill", 1), ("decode", 1), ("decode", 2), ("training", 1))
    ]
    assert gpu.graphs == 2 and not any(row.reason for row in ours)
    assert all(row.ms and row.tokens_per_second for row in ours)
    assert all(row.of_bandwidth for row in ours if row.mode == "decode")
    assert all(row.of_gemm for row in ours if row.mode != "decode")
    if peers:
        assert {row.mode for row in rows if row.who == "transformers" and row.ms} == {
            *("prefill", "decode", "training")
        }
    show("a processor", RATES, rows)
    assert "decode" in capsys.readouterr().out


def test_a_gpu_that_is_not_there() -> None:
    if not torch.cuda.is_available():
        from linstate.bench.gpu import require
        from linstate.errors import BackendError

        with pytest.raises(BackendError, match="torch sees none here"):
            require("bench model")


def test_a_failure_is_a_row_with_its_reason() -> None:
    """Triton takes nothing on a processor, unless it interprets; the others are measured."""
    plan = cuda.Plan(
        tokens=(8,), sizes=((1, 1),), size=8, rounds=1, only="delta_rule, g per head", cold=False
    )
    found = [row for rows in cuda.sweep(plan, RATES, Processor()) for row in rows]
    failed = {(row.who, row.mode) for row in found if row.reason}
    assert ("triton", "forward") in failed
    assert {row.mode for row in found if row.who == "torch" and row.ms} == set(cuda.MODES)
    assert _table(found).row_count == len(found)
