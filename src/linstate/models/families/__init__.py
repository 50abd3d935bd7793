"""One file per checkpoint family; a new file here is found, loads, is listed and is under every test without another edit."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, TypeVar

from linstate.errors import CheckpointError
from linstate.models.families.base import Checkpoints, EncoderFamily, Family

__all__ = ["EncoderFamily", "Family", "all_families", "encoder_families", "find", "find_encoder"]

F = TypeVar("F", bound=Checkpoints[Any])


@cache
def all_families() -> tuple[Family, ...]:
    """Every family of language models, by the name of its file."""
    return tuple(_discover(Family))  # type: ignore[type-abstract]


@cache
def encoder_families() -> tuple[EncoderFamily, ...]:
    """Every family of encoders."""
    return tuple(_discover(EncoderFamily))  # type: ignore[type-abstract]


def _discover(kind: type[F]) -> list[F]:
    found = []
    for module in pkgutil.iter_modules(__path__):
        if module.name == "base" or module.name.startswith("_"):
            continue
        loaded = importlib.import_module(f"{__name__}.{module.name}")
        found += [
            member()
            for member in vars(loaded).values()
            if inspect.isclass(member)
            and issubclass(member, kind)
            and member.__module__ == loaded.__name__
            and not inspect.isabstract(member)
        ]
    return found


def find(raw: Mapping[str, Any], where: str) -> Family:
    """The family of a ``config.json``. Raises CheckpointError that lists the model types there are."""
    for family in encoder_families():
        if family.accepts(raw):
            raise CheckpointError(
                f"{where}: model_type {raw.get('model_type')!r} is an encoder, which has no state and writes no text;"
                " linstate.models.Encoder.from_pretrained reads it"
            )
    return _find(all_families(), raw, where)


def find_encoder(raw: Mapping[str, Any], where: str) -> EncoderFamily:
    """The family of an encoder's ``config.json``. Raises CheckpointError that lists the model types there are."""
    return _find(encoder_families(), raw, where, also=("linstate_encoder",))


def _find(families: Sequence[F], raw: Mapping[str, Any], where: str, also: tuple[str, ...] = ()) -> F:
    for family in families:
        if family.accepts(raw):
            return family
    known = sorted({*also, *(name for family in families for name in family.model_types)})
    raise CheckpointError(
        f"{where}: model_type {raw.get('model_type')!r} cannot be read; Linstate reads: {', '.join(known)}"
    )
