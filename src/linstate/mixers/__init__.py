"""One file per architecture; a new file here is found, configurable and under every law without another edit."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from functools import cache

from linstate.errors import ConfigError
from linstate.mixers._parallel import JOIN, parallel
from linstate.mixers.base import Mixer

__all__ = ["Mixer", "find", "names", "split"]

_PARTS = {"base", "parts"}


@cache
def names() -> tuple[str, ...]:
    """The names of all mixers, sorted."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name for name in found if name not in _PARTS and not name.startswith("_")))


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
    if name not in names():
        raise ConfigError(f"there is no mixer {name!r}; there are: {', '.join(names())}")
    module = importlib.import_module(f"{__name__}.{name}")
    classes = [
        member
        for member in vars(module).values()
        if inspect.isclass(member)
        and issubclass(member, Mixer)
        and member.__module__ == module.__name__
        and not inspect.isabstract(member)
    ]
    if len(classes) != 1:
        raise ConfigError(f"mixers/{name}.py must define exactly one concrete Mixer, found {len(classes)}")
    return classes[0]
