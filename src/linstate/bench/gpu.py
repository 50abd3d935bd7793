"""How times are taken on a GPU: events around calls that are made in turn, graphs where calls are short, and what the chip does at best."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from linstate.errors import BackendError
from linstate.ops.triton import runtime

Run = Callable[[], Any]


def require(command: str) -> None:
    """Raises BackendError, saying what is missing, where nothing can be measured."""
    if not torch.cuda.is_available():
        raise BackendError(
            f"{command} --device cuda measures on an NVIDIA GPU, and torch sees none here; without --device the CPU is measured"
        )
    if why := runtime.missing():
        raise BackendError(f"{command} --device cuda: {why}")


class Gpu:
    """The GPU that is measured. Tests put a processor in its place."""

    name = "cuda"

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def empty_cache(self) -> None:
        torch.cuda.empty_cache()

    def cache_bytes(self) -> int:
        """Of the second-level cache."""
        return int(torch.cuda.get_device_properties(0).L2_cache_size)

    def milliseconds(self, run: Run) -> float:
        """Of one call, on the device's own clock."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def graph(self, run: Run) -> Run:
        """The call as a graph: its kernels without the host between them. It must have run before, and must not wait for the device."""
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            kept = run()

        def replay(kept: Any = kept) -> None:
            graph.replay()

        return replay


def in_turn(gpu: Gpu, runs: dict[str, Run], rounds: int) -> dict[str, float]:
    """Median milliseconds of each; three calls of each before the first round do not count. Every other round is in reverse order."""
    for run in runs.values():
        for _ in range(3):
            run()
    gpu.synchronize()
    times: dict[str, list[float]] = {who: [] for who in runs}
    order = list(runs)
    for number in range(rounds):
        for who in reversed(order) if number % 2 else order:
            times[who].append(gpu.milliseconds(runs[who]))
    return {who: statistics.median(found) for who, found in times.items()}


@dataclass(frozen=True)
class Rates:
    """Of this GPU in this run: bytes a second of a large copy (read and write counted), operations a second of a large matmul."""

    bytes: float
    flops: float


def rates(gpu: Gpu, dtype: torch.dtype, *, size: int = 8192, copied: int = 1 << 30) -> Rates:
    """Measured: a copy of ``copied`` bytes, a matmul of ``size``."""
    source = torch.empty(copied, dtype=torch.uint8, device=gpu.name)
    target = torch.empty_like(source)
    a = torch.randn(size, size, device=gpu.name).to(dtype)
    timed = in_turn(gpu, {"copy": lambda: target.copy_(source), "gemm": lambda: a @ a}, 10)
    return Rates(2 * copied / timed["copy"] * 1e3, 2 * size**3 / timed["gemm"] * 1e3)
