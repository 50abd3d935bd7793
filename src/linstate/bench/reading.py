"""How time and memory grow with the text: a recurrent model beside a softmax model of the same width."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from linstate.engine.reader import call
from linstate.models import Decoder, ModelConfig
from linstate.types import state_bytes


@dataclass(frozen=True)
class Point:
    """One block of a reading: tokens before it, seconds per token in it, bytes of the state behind it."""

    position: int
    seconds_per_token: float
    state_bytes: int


def resident_bytes() -> int:
    """Memory of this process that is resident now (Linux), or its peak elsewhere."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        import os

        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def softmax_twin(config: ModelConfig) -> Decoder:
    """A random model of the same width, depth and feed-forward whose every layer is full attention."""
    kept = {name: options for name, options in config.options.items() if name in config.feed_forwards}
    twin = replace(config, pattern=("attention",), options=kept, feed_forward=config.feed_forwards)
    return Decoder(twin).eval()


def kv_cache_bytes(config: ModelConfig, tokens: int, item: int = 4) -> int:
    """The KV cache of a softmax model of the same width and depth: two vectors of D numbers per token and layer."""
    return 2 * len(config.applied) * config.d_model * tokens * item


def read_curve(decoder: Decoder, tokens: int, *, block: int = 256, seconds: float = 15.0) -> Iterator[Point]:
    """Read random tokens in blocks until ``tokens`` are read or ``seconds`` are over; a point for each block."""
    generator = torch.Generator().manual_seed(0)
    state, started = decoder.init_state(1), time.perf_counter()
    for position in range(0, tokens, block):
        ids = torch.randint(decoder.config.vocab_size, (block,), generator=generator).tolist()
        begin = time.perf_counter()
        _, state = call(decoder, ids, state, "none")
        end = time.perf_counter()
        yield Point(position, (end - begin) / block, state_bytes(state))
        if end - started > seconds:
            return
