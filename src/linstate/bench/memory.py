"""Peak extra memory of one call, beyond its inputs and outputs, in a process of its own.

``python -m linstate.bench.memory_child CASE WHO TOKENS HEADS SIZE DTYPE THREADS`` makes the inputs, calls the implementation once
on a few tokens (libraries are loaded then, and threads begun), and then once on all of them. What the system says about
this process's peak of resident memory has by then the peak of making the inputs in it; so as much memory is taken and
touched as brings the process back to that peak, and what the call adds to it is the call's. What it returned is
subtracted. The allocator is told to give freed blocks back at once, so that none that the call could take again
are left over from before. Page counts of the system are good to about a megabyte.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linstate.bench.reading import resident_bytes

_ENOUGH = 64 * 1024
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}


def peak_bytes() -> int | None:
    """The most resident memory that this process has had; None where the system does not say."""
    status = Path("/proc/self/status")
    if status.exists():  # not getrusage: its peak is inherited from the process that started this one
        for line in status.read_text("utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _tensors(result: Any) -> Iterable[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, (tuple, list)):
        for part in result:
            yield from _tensors(part)


def extra_bytes(run: Callable[[], Any]) -> int | None:
    """Peak of memory during a call beyond what was there before it and what it returns."""
    peak = peak_bytes()
    if peak is None:
        return None
    ballast = []
    while (short := peak - resident_bytes()) > _ENOUGH:
        ballast.append(torch.ones(short // 4))
    before = max(peak, peak_bytes() or 0)
    with torch.no_grad():
        result = run()
    after = peak_bytes() or 0
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(result)}
    return max(0, after - before - sum(storages.values()))


def in_child(
    case: str, who: str, tokens: int, heads: int, size: int, dtype: str, seconds: float = 600.0
) -> int | None:
    """:func:`extra_bytes` of an implementation in a fresh process; None where it could not be measured."""
    words = (case, who, tokens, heads, size, dtype, torch.get_num_threads())
    paths = os.pathsep.join(path for path in sys.path if path)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "linstate.bench.memory_child", *map(str, words)],
            env={**os.environ, **_ALLOCATOR, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            check=True,
            timeout=seconds,
        )
        found: int | None = json.loads(done.stdout)["extra_bytes"]
    except (subprocess.SubprocessError, ValueError, KeyError):
        return None
    return found
