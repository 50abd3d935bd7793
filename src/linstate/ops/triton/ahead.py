"""What the programs of a call take on a GPU that is not there: compiled ahead of time for a named architecture.

:func:`recorded` collects what a call would launch, with the arguments it would be launched with; on tensors of the device ``meta`` nothing is
allocated. :func:`compiled` compiles one such launch and says what it takes. Neither needs a GPU, but Triton must not be
interpreting.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linstate.errors import BackendError
from linstate.ops.triton import runtime

_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


@dataclass(frozen=True)
class Launch:
    """A program, how many of it, and what it is told."""

    program: Any
    programs: int
    arguments: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class Resources:
    """Of one thread: registers, and bytes of spilled ones. Of one program: bytes of shared memory, warps. Seconds to compile."""

    name: str
    registers: int
    spilled: int
    shared: int
    warps: int
    seconds: float


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within, launches are collected instead of made."""
    found: list[Launch] = []

    def instead(program: Any, programs: int, *arguments: Any, **options: Any) -> None:
        if programs:
            found.append(Launch(program, programs, arguments, options))

    before, runtime.send = runtime.send, instead
    try:
        yield found
    finally:
        runtime.send = before


def compiled(launch: Launch, capability: int = 90) -> Resources:
    """Compile a launch for compute capability ``capability`` (90: H100, H200).

    Raises:
        BackendError: Triton is interpreting, or a program does not compile.
    """
    if runtime.interpreted():
        raise BackendError("Triton is interpreting (TRITON_INTERPRET): nothing is compiled; unset it and start again")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    program, settings = launch.program, dict(launch.options)
    warps = settings.pop("num_warps", 4)
    hints = {"num_warps": warps, "num_stages": settings.pop("num_stages", 3)}
    signature, constants, attributes = {}, dict[tuple[int, ...], Any](), dict[tuple[int, ...], Any]()
    given = dict(zip(program.arg_names, launch.arguments, strict=False)) | settings
    fixed = {p.name for p in program.params if p.do_not_specialize}
    for number, name in enumerate(program.arg_names):
        value = given[name]
        one = isinstance(value, int) and value == 1 and name not in fixed
        if name in settings or value is None or one:
            signature[name], constants[number,] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name], attributes[number,] = _TYPES[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and name not in fixed:
                attributes[number,] = [["tt.divisibility", 16]]
    start = time.perf_counter()
    source = ASTSource(fn=program, signature=signature, constexprs=constants, attrs=attributes)
    try:
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=hints)
    except Exception as error:  # of many kinds, from the front end to ptxas
        raise BackendError(f"{program.__name__} does not compile for sm_{capability}: {error}") from error
    seconds = time.perf_counter() - start
    registers, spilled = _usage(made.asm["cubin"])
    return Resources(program.__name__, registers, spilled, made.metadata.shared, warps, seconds)


def _usage(cubin: bytes) -> tuple[int, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "program.cubin"
        file.write_bytes(cubin)
        command = [str(tool), "--dump-resource-usage", str(file)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    if found is None:
        raise BackendError(f"cuobjdump says nothing of registers: {said[:200]!r}")
    return int(found[1]), int(found[2])
