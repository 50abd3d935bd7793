"""Linstate: linear-attention models that read a text once and keep what they read in a small state."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from linstate.engine import LanguageModel, Sampling
    from linstate.errors import LinstateError
    from linstate.models import Decoder, ModelConfig
    from linstate.patch import fork_cache, load_cache, patch_transformers, save_cache
    from linstate.state import State

__all__ = [
    "Decoder",
    "LanguageModel",
    "LinstateError",
    "ModelConfig",
    "Sampling",
    "State",
    "__version__",
    "fork_cache",
    "load_cache",
    "patch_transformers",
    "save_cache",
]
__version__ = "0.1.0"

_ROOMS = {
    "Decoder": "models",
    "LanguageModel": "engine",
    "LinstateError": "errors",
    "ModelConfig": "models",
    "Sampling": "engine",
    "State": "state",
    "fork_cache": "patch",
    "load_cache": "patch",
    "patch_transformers": "patch",
    "save_cache": "patch",
}


def __getattr__(name: str) -> Any:
    """Torch takes seconds to import, so each name is fetched from its room when it is first asked for."""
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
