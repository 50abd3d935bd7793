"""How architectures are found: the files of a folder, each with one concrete class."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Sequence
from typing import TypeVar

from linstate.errors import ConfigError
from linstate.mixers.base import Configurable

Kind = TypeVar("Kind", bound=Configurable)

_PARTS = {"base", "parts"}


def files(path: Iterable[str]) -> tuple[str, ...]:
    """The architectures of a package's folder, sorted: its modules but for parts and what begins with an underscore."""
    found = (module.name for module in pkgutil.iter_modules(path) if not module.ispkg)
    return tuple(sorted(name for name in found if name not in _PARTS and not name.startswith("_")))


def class_of(package: str, name: str, names: Sequence[str], kind: type[Kind]) -> type[Kind]:
    """The one concrete ``kind`` of the module ``package.name``. Raises ConfigError."""
    if name not in names:
        raise ConfigError(f"there is no {kind.kind} {name!r}; there are: {', '.join(names)}")
    module = importlib.import_module(f"{package}.{name}")
    classes = [
        member
        for member in vars(module).values()
        if inspect.isclass(member)
        and issubclass(member, kind)
        and member.__module__ == module.__name__
        and not inspect.isabstract(member)
    ]
    if len(classes) != 1:
        where = package.removeprefix("linstate.").replace(".", "/")
        raise ConfigError(
            f"{where}/{name}.py must define exactly one concrete {kind.__name__}, found {len(classes)}"
        )
    return classes[0]
