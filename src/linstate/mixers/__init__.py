"""One file per architecture; a new file here is found, configurable and under every law without another edit."""

from __future__ import annotations

from functools import cache

from linstate.mixers._discovery import class_of, files
from linstate.mixers.base import Mixer

__all__ = ["Mixer", "find", "names"]


@cache
def names() -> tuple[str, ...]:
    """The names of all mixers, sorted."""
    return files(__path__)


@cache
def find(name: str) -> type[Mixer]:
    """The mixer of the file ``mixers/<name>.py``. Raises ConfigError for a name that does not exist."""
    return class_of(__name__, name, names(), Mixer)  # type: ignore[type-abstract]
