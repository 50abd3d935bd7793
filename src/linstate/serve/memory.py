"""The memory of a server that runs for months: what the C library keeps of what was freed, given back.

glibc keeps what was freed between pieces that live. A server whose states come and go grows so for hours, though it holds no more
than at the beginning. Of what is free, every whole page is returned once in a while; on other C libraries this does nothing.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import platform
from collections.abc import Callable
from functools import cache
from pathlib import Path

EVERY = 20.0
"""Seconds between two returns."""


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    if platform.libc_ver()[0] != "glibc":
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def trim() -> bool:
    """Give back what is free; returns whether anything was. False where the C library is not glibc."""
    found = _malloc_trim()
    return found is not None and bool(found(0))


async def keep_trimmed() -> None:
    """:func:`trim` again and again, in a thread, until cancelled."""
    while _malloc_trim() is not None:
        await asyncio.sleep(EVERY)
        await asyncio.to_thread(trim)


def resident() -> int | None:
    """Bytes of memory that this process holds; None where the system does not say (no ``/proc``)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError, AttributeError):
        return None
