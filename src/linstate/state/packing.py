"""Tensors to the bytes of a safetensors file, again and again in one process.

``safetensors.torch.save`` looks at a tensor through a ctypes type of its length, and ctypes keeps every such type for good: 6 KB for
each length that a process ever saved, and states of windows and caches have thousands. Given addresses, the library needs none.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

_Spec: Any = getattr(safetensors, "TensorSpec", None)  # safetensors 0.8


_NAMES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "I8", "U8", "BOOL")


def layout(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """The table of a safetensors file of these tensors, in the order in which their bytes stand: dtype, shape, ``data_offsets``.

    As the library lays them out; who writes a file by it reads the header back and compares.
    """
    order = sorted(tensors, key=lambda name: (_ORDER.index(_NAMES[tensors[name].dtype]), name))
    table, at = {}, 0
    for name in order:
        t = tensors[name]
        table[name] = {"dtype": _NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + t.nbytes]}
        at += t.nbytes
    return table


def _specs(held: Mapping[str, Tensor]) -> dict[str, Any] | None:
    if _Spec is None or sys.byteorder == "big":
        return None
    return {
        name: _Spec(
            dtype=str(t.dtype).removeprefix("torch."),
            shape=t.shape,
            data_ptr=t.data_ptr(),
            data_len=t.nbytes,
        )
        for name, t in held.items()
    }


def packed(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """The bytes that ``safetensors.torch.save`` makes of tensors on the CPU."""
    held = {name: t.detach().contiguous() for name, t in tensors.items()}  # an address keeps nothing alive
    specs = _specs(held)
    if specs is None:
        return safetensors.torch.save(held, metadata)
    return bytes(safetensors.serialize(specs, metadata=metadata))


def pack_into(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write them to a file straight from where they lie: no second copy of a state is made."""
    held = {name: t.detach().contiguous() for name, t in tensors.items()}
    specs = _specs(held)
    if specs is None:
        path.write_bytes(safetensors.torch.save(held, metadata))
    else:
        safetensors.serialize_file(specs, path, metadata=metadata)
