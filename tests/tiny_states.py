"""States without a model: a few numbers made from the token ids, so that equal texts have equal states."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from linstate import State
from linstate.models.fingerprint import Fingerprint
from linstate.state.store.prefix import chains

MODEL = Fingerprint("config", "weights", "tokenizer")
GRID = 4


def tiny(ids: Sequence[int], *, model: Fingerprint = MODEL, on_grid: bool = False) -> State:
    """The state after ``ids``; with ``on_grid`` their number is a multiple of the grid, and nothing hangs over."""
    ids = list(ids)
    blocks = len(ids) // GRID if on_grid else max(0, len(ids) - 1) // GRID
    read = ids[: blocks * GRID]
    generator = torch.Generator().manual_seed(hash(tuple(read)) % 2**31)
    return State(
        tensors={"layers.0.mixer.S": torch.randn(1, 2, 4, 4, generator=generator)},
        model=model,
        model_name="tiny",
        layers=("linear_transformer",),
        grid=GRID,
        position=len(ids),
        tail=tuple(ids[blocks * GRID :]),
        chain=list(chains(read, GRID))[-1],
    )
