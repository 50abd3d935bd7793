"""Where the tests of Triton programs run: on a GPU, or under Triton's interpreter in a process of their own."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from laws.laws import Op
from laws.op_cases import kernel
from linstate.ops.triton import runtime

# Tests poison memory with torch's deterministic algorithms, and cuBLAS wants this before it begins.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
serves = pytest.mark.skipif(
    DEVICE == "cpu" and not runtime.interpreted(),
    reason="no GPU; tests/ops/test_triton.py runs this file under Triton's interpreter",
)


def on_device(recurrence: str, form: str) -> Op:
    """The op with its Triton kernel; tensors go to the GPU and back, where there is one."""
    op = kernel(recurrence, form, "triton")
    if DEVICE == "cpu":
        return op

    def move(x: Any, device: str) -> Any:
        return x.to(device) if isinstance(x, Tensor) else x

    def run(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        o, state = op(
            *(move(x, DEVICE) for x in args), **{name: move(x, DEVICE) for name, x in kwargs.items()}
        )
        return o.cpu(), state.cpu()

    return run


def count_launches(call: Callable[[], Any]) -> dict[str, int]:
    """How often each program is launched in a call."""
    runtime.launches.clear()
    call()
    return dict(runtime.launches)
