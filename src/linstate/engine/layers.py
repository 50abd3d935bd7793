"""The state of a model layer by layer, as the layers of one call finish."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from linstate.models import Decoder
from linstate.types import LayerState, prefixed


@contextmanager
def each_layer(decoder: Decoder, told: Callable[[int, LayerState], None]) -> Iterator[None]:
    """Within it, ``told`` gets the number of each layer that has run in a call, and its part of the state after it."""
    number = 0

    def hook(_: nn.Module, __: Any, out: tuple[Any, LayerState]) -> None:
        nonlocal number
        told(number, prefixed(f"layers.{number}", out[1]))
        number += 1

    handles = [block.register_forward_hook(hook) for block in {id(b): b for b in decoder.blocks()}.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
