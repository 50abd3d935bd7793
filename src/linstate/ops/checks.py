"""Argument checks of the ops: every error names the argument, what was expected and what came."""

from __future__ import annotations

import torch
from torch import Tensor

from linstate.errors import ArgumentError
from linstate.types import state_dtype

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Shapes:
    """Binds dimension letters to sizes as arguments are checked, and refuses what does not fit.

    ``Shapes("delta_rule").bind("q", q, "B T Hk K")`` sets B, T, Hk and K, or compares them if they are
    set. Nothing is ever broadcast.
    """

    def __init__(self, op: str) -> None:
        self.op = op
        self.sizes: dict[str, int] = {}
        self.first: tuple[str, Tensor] | None = None
        self.on_cpu = False

    def __getitem__(self, letter: str) -> int:
        return self.sizes[letter]

    def bind(self, name: str, tensor: Tensor, spec: str, *, same_device: bool = True) -> None:
        """Check ``tensor`` against ``spec`` (letters or numbers). Raises ArgumentError."""
        letters = spec.split()
        if not isinstance(tensor, Tensor):
            raise ArgumentError(
                f"{self.op}: {name} must be a tensor [{', '.join(letters)}], got {type(tensor).__name__}"
            )
        if tensor.dim() != len(letters):
            raise ArgumentError(
                f"{self.op}: {name} must have the shape [{', '.join(letters)}], got {list(tensor.shape)}"
            )
        sizes = self.sizes
        for letter, size in zip(letters, tensor.shape, strict=True):
            want = int(letter) if letter.isdigit() else sizes.setdefault(letter, size)
            if want != size:
                known = ", ".join(f"{key}={value}" for key, value in self.sizes.items())
                raise ArgumentError(
                    f"{self.op}: {name} must have the shape [{', '.join(letters)}] with {known}; "
                    f"got {list(tensor.shape)} ({letter} is {size}, expected {want})"
                )
        if tensor.dtype not in FLOATS:
            raise ArgumentError(f"{self.op}: {name} must be a floating point tensor, got {tensor.dtype}")
        if tensor.layout is not torch.strided:
            raise ArgumentError(f"{self.op}: {name} must be a dense tensor, got the layout {tensor.layout}")
        if self.first is None:
            self.first, self.on_cpu = (name, tensor), tensor.is_cpu
        elif self.on_cpu and tensor.is_cpu:  # what is asked most, without two device objects
            return
        elif same_device and tensor.device != self.first[1].device:
            raise ArgumentError(
                f"{self.op}: {name} is on {tensor.device}, but {self.first[0]} is on {self.first[1].device}"
            )

    def bind_one_of(self, name: str, tensor: Tensor, specs: tuple[str, ...]) -> str:
        """Check against the spec with the tensor's number of dimensions; returns that spec."""
        for spec in specs:
            if isinstance(tensor, Tensor) and tensor.dim() == len(spec.split()):
                self.bind(name, tensor, spec)
                return spec
        want = " or ".join("[" + ", ".join(spec.split()) + "]" for spec in specs)
        found = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ArgumentError(f"{self.op}: {name} must have the shape {want}, got {found}")

    def bind_state(self, tensor: Tensor, spec: str, *inputs: Tensor | None) -> None:
        """Check ``initial_state`` as :meth:`bind` does, and that it has the dtype of states of these inputs."""
        self.bind("initial_state", tensor, spec)
        want = state_dtype(*inputs)
        if tensor.dtype != want:
            raise ArgumentError(
                f"{self.op}: initial_state must be {want} (float64 for float64 inputs, else float32), got {tensor.dtype}"
            )

    def groups(self) -> int:
        """How many value heads share one key head. Raises ArgumentError if Hv is no multiple of Hk."""
        hk, hv = self.sizes["Hk"], self.sizes["Hv"]
        if hk == 0 or hv % hk:
            raise ArgumentError(
                f"{self.op}: the heads of v ({hv}) must be a multiple of the heads of q and k ({hk})"
            )
        return hv // hk


def check_cu_seqlens(op: str, cu_seqlens: Tensor, batch: int, total: int) -> list[int]:
    """Check a packed call's boundaries [N+1]; returns them as a list. Raises ArgumentError."""
    if batch != 1:
        raise ArgumentError(
            f"{op}: with cu_seqlens the sequences are packed along T and B must be 1, got B={batch}"
        )
    if not isinstance(cu_seqlens, Tensor):
        raise ArgumentError(f"{op}: cu_seqlens must be a tensor [N + 1], got {type(cu_seqlens).__name__}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ArgumentError(
            f"{op}: cu_seqlens must be int32 or int64 [N + 1] with N >= 1, got {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        )
    bounds: list[int] = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != total or any(b < a for a, b in zip(bounds, bounds[1:], strict=False)):
        raise ArgumentError(
            f"{op}: cu_seqlens must rise from 0 to T={total}, got {bounds[:8]}...{bounds[-1]}"
        )
    return bounds


def check_lengths(op: str, length: Tensor, places: int, name: str = "initial_state.length") -> None:
    """How many of ``places`` are in use, int64 ``[B]``: kernels make addresses and sizes of it. Raises ArgumentError.

    Only of numbers that are here: nothing waits for a GPU, whose kernels mask by it, and a compiler's tensors have none.
    """
    if type(length) is not Tensor or not length.is_cpu or torch.compiler.is_compiling():
        return
    held = length.tolist()
    if held and not 0 <= min(held) <= max(held) <= places:
        raise ArgumentError(f"{op}: {name} must lie in [0, {places}], got {held[:8]}")
