"""Tensors to the bytes of a safetensors file, again and again in one process.

``safetensors.torch.save`` looks at a tensor through a ctypes type of its length, and ctypes keeps every such type for good: 6 KB for
each length that a process ever saved, and states of windows and caches have thousands. Given addresses, the library needs none.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

_Spec: Any = getattr(safetensors, "TensorSpec", None)  # safetensors 0.8


def packed(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """The bytes that ``safetensors.torch.save`` makes of tensors on the CPU."""
    held = {name: t.detach().contiguous() for name, t in tensors.items()}  # an address keeps nothing alive
    if _Spec is None or sys.byteorder == "big":
        return safetensors.torch.save(held, metadata)
    specs = {
        name: _Spec(
            dtype=str(t.dtype).removeprefix("torch."),
            shape=t.shape,
            data_ptr=t.data_ptr(),
            data_len=t.nbytes,
        )
        for name, t in held.items()
    }
    return bytes(safetensors.serialize(specs, metadata=metadata))
