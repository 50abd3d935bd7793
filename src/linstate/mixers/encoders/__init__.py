"""Layers that mix a whole text at once, not causally: one file each, found as the mixers are. They have no state."""

from __future__ import annotations

from functools import cache

from linstate.mixers._discovery import class_of, files
from linstate.mixers.encoders.base import EncoderMixer

__all__ = ["EncoderMixer", "find", "names"]


@cache
def names() -> tuple[str, ...]:
    """The names of all encoders, sorted."""
    return files(__path__)


@cache
def find(name: str) -> type[EncoderMixer]:
    """The encoder of the file ``mixers/encoders/<name>.py``. Raises ConfigError for a name that does not exist."""
    return class_of(__name__, name, names(), EncoderMixer)  # type: ignore[type-abstract]
