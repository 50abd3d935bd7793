"""A processor in the place of a GPU, so that the benchmarks of GPUs run: everything but the times means what it says."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from linstate.bench.gpu import Gpu


class Processor(Gpu):
    name = "cpu"

    def __init__(self) -> None:
        self.graphs = 0

    def synchronize(self) -> None:
        """It waits anyway."""

    def empty_cache(self) -> None:
        """There is none."""

    def cache_bytes(self) -> int:
        return 2048

    def milliseconds(self, run: Callable[[], Any]) -> float:
        begin = time.perf_counter()
        run()
        return (time.perf_counter() - begin) * 1e3

    def graph(self, run: Callable[[], Any]) -> Callable[[], Any]:
        self.graphs += 1
        return run
