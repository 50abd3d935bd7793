"""FLA's layers where there is no GPU: imported only where Triton is, with a cache of the least that they ask for.

Their kernels do not run here; a test replaces those that its layer calls by FLA's own naive references.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor


class Cache(dict[int, dict[str, Any]]):
    """The least that FLA's layers ask of a cache."""

    def update(self, layer_idx: int, offset: int, **state: Tensor) -> None:  # type: ignore[override]
        self.setdefault(layer_idx, {}).update(state)

    def __len__(self) -> int:
        return 1 + max(self, default=-1)


@contextmanager
def unregistered() -> Iterator[None]:
    """FLA registers its models with transformers, in the place of transformers' own of the same name: not here."""
    pytest.importorskip("transformers", reason="extra 'hf' is not installed")
    from transformers.models.auto import configuration_auto, modeling_auto

    tables = [configuration_auto.CONFIG_MAPPING._extra_content]
    tables += [
        kind._model_mapping._extra_content
        for kind in vars(modeling_auto).values()
        if isinstance(kind, type) and getattr(kind, "_model_mapping", None) is not None
    ]
    kept = [dict(table) for table in tables]
    yield
    for table, before in zip(tables, kept, strict=True):
        table.clear()
        table.update(before)


def fla_module(name: str) -> ModuleType:
    """The module ``fla.<name>``. The first import needs Triton, and takes ten seconds."""
    with warnings.catch_warnings(), unregistered():
        warnings.simplefilter("ignore")
        pytest.importorskip("triton", reason="extra 'oracles' is not installed, or there is no Triton here")
        return pytest.importorskip(f"fla.{name}", reason="extra 'oracles' is not installed")


def token_shift(
    x: Tensor, cu_seqlens: None = None, *, cache: Tensor | None = None, output_cache: bool = False
) -> Any:
    """FLA's ``token_shift`` by its own reference: the token before minus the token, from a cache if there is one."""
    reference = fla_module("modules.token_shift").token_shift_ref
    longer = x if cache is None else torch.cat([cache[:, None], x], dim=1)
    shifted = reference(longer)[:, -x.shape[1] :]
    return (shifted, x[:, -1]) if output_cache else shifted
