"""One file per architecture; a new file here is found, configurable and under every law without another edit."""

from __future__ import annotations

from functools import cache

from linstate.errors import ConfigError
from linstate.mixers._discovery import class_of, files
from linstate.mixers._parallel import JOIN, parallel
from linstate.mixers.base import Mixer

__all__ = ["JOIN", "Mixer", "find", "names", "split"]


@cache
def names() -> tuple[str, ...]:
    """The names of all mixers, sorted."""
    return files(__path__)


def split(name: str) -> tuple[str, ...]:
    """The mixers of a layer: ``"mamba2+attention"`` has two, side by side; others have one."""
    return tuple(name.split(JOIN))


@cache
def find(name: str) -> type[Mixer]:
    """The mixer of the file ``mixers/<name>.py``; of ``"a+b"`` both side by side. Raises ConfigError for other names."""
    if JOIN in name:
        kinds = {part: find(part) for part in split(name)}
        if len(kinds) < len(split(name)):
            raise ConfigError(f"a mixer cannot stand beside itself: {name!r}")
        return parallel(kinds)
    return class_of(__name__, name, names(), Mixer)  # type: ignore[type-abstract]
