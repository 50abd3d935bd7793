"""One file per architecture; a new file here is found, configurable and under every law without another edit."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from functools import cache

from linstate.errors import ConfigError
from linstate.mixers.base import Mixer

__all__ = ["Mixer", "find", "names"]

_PARTS = {"base", "parts"}


@cache
def names() -> tuple[str, ...]:
    """The names of all mixers, sorted."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name for name in found if name not in _PARTS and not name.startswith("_")))


@cache
def find(name: str) -> type[Mixer]:
    """The mixer of the file ``mixers/<name>.py``. Raises ConfigError for a name that does not exist."""
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
