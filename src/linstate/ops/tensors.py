"""Tensors as every backend's kernels read them, and whether a call needs ``torch.library`` at all."""

from __future__ import annotations

import torch
from torch import Tensor

from linstate.errors import ArgumentError
from linstate.ops.dispatch import Call

_USUAL = (Tensor, torch.nn.Parameter)

CPU = torch.device("cpu")


def plain(*tensors: Tensor | None) -> tuple[bool, bool]:
    """Whether a kernel may be called directly, and whether a gradient is wanted.

    A gradient, a compiler or a tensor of another kind (a fake one) needs ``torch.library``; nothing else pays for it.
    """
    given = [t for t in tensors if t is not None]
    learning = torch.is_grad_enabled() and any([t.requires_grad for t in given])
    usual = all([type(t) in _USUAL for t in given])
    return usual and not learning and not torch.compiler.is_compiling(), learning


def keeps(call: Call) -> bool:
    """Whether a kernel keeps the snapshots of this call on its way: their gradient would need the torch form's pieces."""
    return plain(*(t for t in call.values() if isinstance(t, Tensor)))[0]


def dense(t: Tensor | None) -> Tensor | None:
    """With its last axis dense; the others may have any stride."""
    return t if t is None or t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def wide(t: Tensor | None) -> Tensor | None:
    """As float32 without gaps."""
    return t if t is None else t.float().contiguous()


def state_of(
    name: str, t: Tensor | None, shape: tuple[int, ...], device: torch.device = CPU
) -> Tensor | None:
    """A state as :func:`wide` gives it, of this shape and on this device. Raises ArgumentError."""
    if t is not None and (tuple(t.shape) != shape or t.device != device):
        raise ArgumentError(
            f"the state's {name} must have the shape {list(shape)} and be on {str(device).replace('cpu', 'the CPU')}, "
            f"as its input is; got {list(t.shape)} on {t.device}"
        )
    return wide(t)
