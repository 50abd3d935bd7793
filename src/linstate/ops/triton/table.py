"""How the programs are cut for a shape: a few configurations by rule, so that nothing is tuned at the first call.

The rules of forward are those that were the fastest on an H200 (``docs/kernels-gpu.md``); those of the gradient are the ones with the fewest spilled registers of what
was compiled for sm_90: a state tile takes at most 8,192 numbers, 32 registers a thread in eight warps; a chunk has 32 tokens, and 16 where there is a level of
halving for each power of two (a gate a channel), at K = 256, and where operands are float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

TILE = 8192
"""Numbers of a state that one program holds."""
SEGMENT = 512
"""Tokens of the shortest segment that is worth two more launches."""


@dataclass(frozen=True)
class Config:
    """``chunk``: tokens, a power of two >= 16. ``block``: value columns of a program."""

    chunk: int
    block: int
    warps: int
    stages: int = 1


def padded(size: int) -> int:
    """The next power of two, at least 16: what a tile of matmuls must be."""
    return max(16, power(size))


def power(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length()


def _block(k: int, v: int, tile: int = TILE) -> int:
    return max(16, min(padded(v), tile // padded(k)))


def _short(kind: int, k: int, wide: bool) -> bool:
    """Whether chunks have 16 tokens: K = 256, and where float32 operands (three of each, or two parts) would leave no registers."""
    return padded(k) == 256 or (wide and kind > 0 and padded(k) >= 128)


def forward(kind: int, gate: int, k: int, v: int, wide: bool = False) -> Config:
    """Of the chunk loop. ``wide``: operands of matmuls are float32, as for inputs in float32 and float16.

    Loads run one chunk ahead (``stages``), where two chunks fit on chip: not with rows of their own for every gate beside the system's squares.
    """
    large = padded(k) == 256
    ahead = not wide and not large and (kind == 0 or (kind == 1 and gate < 2))
    return Config(32 if wide or large else 64, min(64, _block(k, v)), 8 if large else 4, 2 if ahead else 1)


def prepare(kind: int, gate: int, k: int, wide: bool = False) -> Config:
    """Of what stands before it; the chunk is that of the loop, ``block`` the columns of q and k that are taken at once."""
    return Config(0, min(32 if gate == 2 or wide else 64, padded(k)), 4 if wide else 2)


def backward(kind: int, gate: int, k: int, v: int, wide: bool = False) -> tuple[Config, Config]:
    """Of the sweep of the state's gradient, and of the gradients of a chunk. Both have the same chunk, a multiple of forward's.

    A state and its gradient are kept for each chunk, so it is as long as registers allow.
    """
    chunk = 16 if (gate == 2 and kind > 0) or _short(kind, k, wide) else 32
    block = min(64, _block(k, v))
    return Config(chunk, block, _warps(k)), Config(chunk, min(32, block), _warps(k))


def _warps(k: int) -> int:
    return 8 if padded(k) >= 64 else 4


def step(k: int, v: int) -> Config:
    """Of one token: small tiles, so that a state is read by as many programs as there can be."""
    return Config(1, max(16, min(padded(v), 2048 // padded(k), 64)), 2)


FINISH = 4096
"""Numbers of a mixer's output that are normed at once."""


def mixer(k: int, v: int) -> Config:
    """Of one token of a whole mixer: larger tiles than ``step``, as each block of columns makes q and k again."""
    return Config(1, max(16, min(padded(v), 4096 // padded(k), 64)), 4)


SCAN_STATE = 256
"""Entries of the scan's state for each column, at most."""


def scan(k: int, v: int) -> Config:
    """Of the elementwise scan: a column of the state for each thread, as long as it has registers for it."""
    warps = 1 if power(k) > 16 else 4
    return Config(1, min(max(power(v), 16), 32 * warps), warps)


def conv(channels: int, tokens: int) -> Config:
    """Of the short convolution."""
    return Config(min(32, power(max(1, tokens))), min(128, power(channels)), 4)


def segments(
    programs: int, tokens: int, processors: int, chunk: int, least: int = SEGMENT, kind: int = 1
) -> tuple[int, int]:
    """(segments, tokens of each): one, unless the programs would leave more than half of the chip idle.

    ``programs``: of one segment. A segment has at least ``least`` tokens and is a multiple of the chunk. Where a state only decays between segments (``kind`` 0) there are
    twice as many, about four programs for each multiprocessor.
    """
    if programs >= processors or tokens < 2 * least:
        return 1, max(chunk, -(-tokens // chunk) * chunk)
    waves = 2 if kind else 4
    wanted = min(-(-waves * processors // programs), tokens // least)
    length = math.ceil(math.ceil(tokens / wanted) / chunk) * chunk
    return -(-tokens // length), length
