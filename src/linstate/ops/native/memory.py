"""Tensors in huge pages: packed weights and states, which every decoded token reads from end to end.

The processor's own prefetching ends with a page. Measured on two cores of an AMD EPYC (Zen 4): one thread reads 18 GB/s in pages
of 4 kB and 31 in those of 2 MB, two threads 24 and 33. ``csrc/bind/memory.cpp``.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

from linstate.ops.native import lib

LARGE = 4 << 20
"""Bytes from which on huge pages are worth it."""
_CHUNK = 32 << 20
_ALIGNED = 64

_lock = threading.Lock()
_chunk = torch.empty(0, dtype=torch.uint8)
"""What is left of the memory that weights are taken from."""


def for_weights(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An empty tensor beside others of its kind: a few large pieces of memory, each of which ends with its last tensor."""
    global _chunk
    size = math.prod(shape) * dtype.itemsize
    whole = -(-size // _ALIGNED) * _ALIGNED
    if whole >= _CHUNK // 2:
        return lib.memory(size, False).view(dtype).view(shape)
    with _lock:
        if whole > _chunk.numel():
            _chunk = lib.memory(_CHUNK, False)
        mine, _chunk = _chunk[:size], _chunk[whole:]
    return mine.view(dtype).view(shape)


def for_states(numbers: int) -> Tensor:
    """An empty float32 tensor ``[numbers]``. Where it is large, its memory is that of one that was let go before, if there is one of
    the same size: the system neither clears it again nor maps it anew."""
    if numbers * 4 < LARGE:
        return torch.empty(numbers)
    return lib.memory(numbers * 4, True).view(torch.float32)
