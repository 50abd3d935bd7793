"""What a layer costs by its formulas: bytes of state and FLOPs against the length of the text."""

from __future__ import annotations

from typing import Any

import torch

from linstate.bench.compare import sizes
from linstate.models import Decoder

D_MODEL = 512
LENGTHS = (1_000, 4_000, 16_000, 64_000, 256_000, 1_000_000)


def measure(mixer: str) -> dict[str, Any]:
    """One block of width :data:`D_MODEL`: its weights, and by length the bytes of its state and FLOPs per token.

    FLOPs are those of reading a text of that length, by the token, with the feed-forward.
    """
    with torch.device("meta"):
        model = Decoder(sizes.config(mixer, 1, D_MODEL, 1))
    (block,) = model.blocks()
    return {
        "weights": sizes.weights_of(model),
        "options": sizes.options(mixer, D_MODEL),
        "state_bytes": {str(n): block.state_bytes(n) for n in LENGTHS},
        "flops": {str(n): round(block.flops(n) / n) for n in LENGTHS},
    }
