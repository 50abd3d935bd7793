"""One file per checkpoint family; a new file here is found, loads, is listed and is under every test without another edit."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import Any

from linstate.errors import CheckpointError
from linstate.models.families.base import Family

__all__ = ["Family", "all_families", "find"]


@cache
def all_families() -> tuple[Family, ...]:
    """Every family, by the name of its file."""
    found = []
    for module in pkgutil.iter_modules(__path__):
        if module.name == "base" or module.name.startswith("_"):
            continue
        loaded = importlib.import_module(f"{__name__}.{module.name}")
        found += [
            member()
            for member in vars(loaded).values()
            if inspect.isclass(member)
            and issubclass(member, Family)
            and member.__module__ == loaded.__name__
            and not inspect.isabstract(member)
        ]
    return tuple(found)


def find(raw: Mapping[str, Any], where: str) -> Family:
    """The family of a ``config.json``. Raises CheckpointError that lists the model types there are."""
    for family in all_families():
        if family.accepts(raw):
            return family
    known = sorted({name for family in all_families() for name in family.model_types})
    raise CheckpointError(
        f"{where}: model_type {raw.get('model_type')!r} cannot be read; Linstate reads: {', '.join(known)}"
    )
