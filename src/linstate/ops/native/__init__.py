"""The compiled part of Linstate, where it was built.

Linstate installs without a C++ compiler: the torch backend then serves every call, and `reason` says why
the native one does not. Nothing else imports `linstate._native`, so this is the only place that has to know:
the other files of this room take :data:`lib` from here.

    >>> from linstate.ops import native
    >>> native.available or bool(native.reason)
    True
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from linstate.errors import BackendError

__all__ = ["available", "cpu_features", "isa", "isas", "lib", "reason", "using"]

_REBUILD = "reinstall Linstate from its source folder (`pip install --force-reinstall --no-deps .`)"


def _load_error() -> str | None:
    """Why the extension cannot serve, in one sentence a person can act on; None if it can."""
    try:
        import linstate._native as _native
    except ModuleNotFoundError:
        return (
            "the C++ extension was not built when Linstate was installed (no C++20 compiler or no Python "
            "headers then, or LINSTATE_NATIVE=off); the torch backend serves. To build it, install a "
            f"compiler and {_REBUILD}"
        )
    except ImportError as error:  # built, but for another machine, Python or C library
        return f"the C++ extension does not load here ({error}); the torch backend serves. To mend it, {_REBUILD}"
    try:
        installed = metadata.version("linstate")
    except metadata.PackageNotFoundError:  # a source tree on sys.path: there is nothing to compare with
        return None
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        return f"torch {torch.__version__} does not hand tensors to C++; the torch backend serves. Install torch 2.11 or newer"
    if _native.version() != installed:
        return (
            f"the C++ extension is of version {_native.version()} and the package of {installed}; "
            f"the torch backend serves. To mend it, {_REBUILD}"
        )
    return None


reason: str | None = _load_error()
"""Why the native backend does not serve; None where it does."""

available: bool = reason is None
"""Whether the compiled extension is there, loads, and is of this version."""


class _Absent:
    """In place of the extension, where it does not serve."""

    def __getattr__(self, name: str) -> Any:
        raise BackendError(f"the native kernels do not serve: {reason}")


if TYPE_CHECKING or available:
    import linstate._native as lib
else:
    lib = _Absent()
"""The compiled module; every use of it raises BackendError where it is absent."""


def cpu_features() -> dict[str, bool]:
    """Instruction sets that this machine's processor has *and* its operating system supports.

    Returns:
        `amx_bf16`, `avx512_bf16`, `avx512f`, `avx2`, `fma`, `neon`, each True or False; an empty mapping
        where the extension is absent (`available` is False), as nothing was asked then.

    >>> set(cpu_features()) <= {"amx_bf16", "avx512_bf16", "avx512f", "avx2", "fma", "neon"}
    True
    """
    if not available:
        return {}
    return lib.cpu_features()


def isas(*, emulated: bool = False) -> tuple[str, ...]:
    """The instruction sets with kernels that this machine can run, the best first; empty where the extension is absent.

    Args:
        emulated: also those that do the work of instructions this machine may lack in plain code. They are slow and
            meant for tests: named last here, chosen only by :func:`using` or LINSTATE_ISA, never by themselves.
    """
    if not available:
        return ()
    return tuple(lib.isas(emulated))


def isa() -> str | None:
    """The instruction set in use, None where the extension is absent. LINSTATE_ISA chose it, or the best there is serves."""
    if not available:
        return None
    return str(lib.isa())


def multiplies_bf16() -> bool:
    """Whether the instruction set in use multiplies bf16 numbers by itself."""
    return isa() == "amx" or (isa() == "avx512" and _has_avx512_bf16)


@contextmanager
def using(name: str) -> Iterator[None]:
    """Use the kernels of one instruction set for a while, in every thread. Raises BackendError if it is not there."""
    before = lib.isa()
    _use(name)
    try:
        yield
    finally:
        lib.use(before)


def _use(name: str) -> None:
    if name not in isas(emulated=True):
        there = ", ".join(isas()) or "none"
        raise BackendError(f"instruction set {name!r} is not on this machine; there is: {there}")
    lib.use(name)


def _join_team() -> None:
    """Let the kernels run on the OpenMP threads that torch has, where it has such.

    Those look for work for some milliseconds behind each of torch's parallel operations. Threads of our own would compete with
    them: on two cores the blocks of a reading then take half as long again.
    """
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        entries = library.GOMP_parallel, library.omp_get_thread_num, library.omp_get_max_threads
    except (OSError, AttributeError):  # another system, or a torch with another kind of threads
        return
    lib.join_team(*(ctypes.cast(entry, ctypes.c_void_p).value or 0 for entry in entries))


_has_avx512_bf16 = cpu_features().get("avx512_bf16", False)
if available:
    _join_team()
if available and os.environ.get("LINSTATE_ISA"):
    _use(os.environ["LINSTATE_ISA"])
