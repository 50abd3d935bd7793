"""What stands between the Triton programs and the table: who is refused, how programs are launched and counted, precision.

Nothing here imports Triton before a call is accepted, and no program is imported before: whether Triton compiles or
interprets (``TRITON_INTERPRET=1``) is read when a program is decorated.
"""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from functools import cache
from typing import Any

import torch
from torch import Tensor

from linstate.errors import ArgumentError
from linstate.ops.dispatch import Call

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST = 256  # of K and V
PRECISIONS = ("tf32x3", "tf32", "ieee")

launches: Counter[str] = Counter()
"""How often each program was launched, by name; everything goes through :func:`launch`. ``launches.clear()`` starts anew."""


_MISSING = None if importlib.util.find_spec("triton") else "Triton is not installed (extra `gpu`; Linux only)"


def missing() -> str | None:
    """Why Triton cannot serve in this process at all, or None."""
    return _MISSING


def interpreted() -> bool:
    """Whether Triton is asked to interpret its programs, which works on a CPU, slowly, and is for tests."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


interpreter_serves = False
"""Whether ``auto`` may choose Triton's interpreter: tests of whole mixers say so."""


def unfit(call: Call) -> str | None:
    """Why no Triton program reads the tensors of this call, or None."""
    if why := missing():
        return why
    for name, tensor in call.items():
        if not isinstance(tensor, Tensor):
            continue
        if tensor.is_cpu:
            if not interpreted():
                return f"{name} is on the CPU, and TRITON_INTERPRET=1 is not set"
            if call.get("asked") == "auto" and not interpreter_serves:
                return "Triton's interpreter serves only where backend='triton' is asked for"
        elif not tensor.is_cuda:
            return f"{name} is on {tensor.device}"
        if tensor.dtype not in DTYPES:
            return f"{name} is {tensor.dtype}, not float32, bfloat16 or float16"
    return None


def launch(program: Any, programs: int, *arguments: Any, **options: Any) -> None:
    """Run ``programs`` of a program over a grid of one axis, on the device of its first tensor, and count it."""
    if programs:
        launches[program.__name__] += 1
        send(program, programs, *arguments, **options)


def _send(program: Any, programs: int, *arguments: Any, **options: Any) -> None:
    device = next(a for a in arguments if isinstance(a, Tensor)).device
    if device.type != "cuda":
        program[(programs,)](*arguments, **options)
        return
    with torch.cuda.device(device):
        program[(programs,)](*arguments, **options)


send = _send
"""What makes a launch; ``ahead.recorded`` puts something else here."""


def precision(dtype: torch.dtype) -> str:
    """How float32 operands are multiplied for inputs of a dtype: bfloat16 ones are not affected, float16 ones are read as tf32.

    float32 inputs: ``tf32x3``, which is float32 up to its last bits, or ``tf32`` where torch is told that this is enough
    (``torch.set_float32_matmul_precision("high")``). ``LINSTATE_TRITON_PRECISION`` decides for both.

    Raises:
        ArgumentError: the variable names something else.
    """
    asked = os.environ.get("LINSTATE_TRITON_PRECISION", "")
    if asked:
        if asked not in PRECISIONS:
            raise ArgumentError(
                f"LINSTATE_TRITON_PRECISION must be one of {', '.join(PRECISIONS)}, got {asked!r}"
            )
        return asked
    if dtype != torch.float32:
        return "tf32"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def operand(dtype: torch.dtype) -> Any:
    """The type in which operands of matmuls are: bfloat16 for bfloat16, else float32 (of a state, float16 could overflow)."""
    import triton.language as tl

    return tl.bfloat16 if dtype == torch.bfloat16 else tl.float32


@cache
def processors(index: int | None) -> int:
    """Multiprocessors of a device; of none (the interpreter), one."""
    if index is None:
        return 1
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def boundaries(bounds: list[int], device: torch.device) -> Tensor:
    """Boundaries of packed sequences on the device, int64 ``[N + 1]``."""
    return torch.tensor(bounds, dtype=torch.int64, device=device)
