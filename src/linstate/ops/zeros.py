"""Zeros that take no memory until something is written into them.

A window of W places that has read a hundred tokens is nearly all zeros, and a server holds hundreds of them. The operating system
gives pages of zeros away for nothing: a page is memory only once it is written. Taken from it directly they also go back to it
whole when they are freed, where a C library would keep the hole between its other pieces.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

LEAST = 256 * 1024
"""Bytes that are worth a mapping of their own: some sixty pages, and two calls of the operating system."""


def untouched_zeros(shape: Sequence[int], like: Tensor) -> Tensor:
    """Zeros of ``shape`` in ``like``'s dtype, on its device. On a CPU, of :data:`LEAST` bytes or more and where the operating
    system has private mappings: of pages that are not written yet."""
    numbers = math.prod(shape)
    size = numbers * like.element_size()
    plain = like.device.type != "cpu" or size < LEAST or torch.compiler.is_compiling()
    if plain or not hasattr(mmap, "MAP_PRIVATE"):
        return like.new_zeros(tuple(shape))
    try:
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # a process may have some 65,000 mappings
        return like.new_zeros(tuple(shape))
    if hasattr(mmap, "MADV_NOHUGEPAGE"):  # a huge page is memory as soon as one byte of it is written
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=like.dtype, count=numbers).view(tuple(shape))
