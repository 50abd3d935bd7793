"""``patch_transformers()``: our kernels in Hugging Face's models, and their lost states mended.

There is no registry to enter a kernel in, but ``forward`` looks its functions up in the module's globals when it is called.
So the globals are replaced, which serves models that were built before as well as those that come; modeling files that
are imported later are patched by a finder on ``sys.meta_path``, which runs what their own loader does and then the same.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch import Tensor

from linstate.errors import ArgumentError, ConfigError
from linstate.patch.functions import FUNCTIONS, StandIn
from linstate.patch.methods import METHODS, Mend

_MODELING = re.compile(r"transformers\.models\.(\w+)\.modeling_(\w+)")
_PACKED = ("cu_seqlens", "seq_idx")
_MARK = "__linstate__"


@dataclass(frozen=True)
class Change:
    """One name that now means something else: ``module.name`` (``name`` may be ``Class.method``), and what that mends."""

    module: str
    name: str
    mends: str


class Patch:
    """What :func:`patch_transformers` changed. Print it, iterate over it, or end it: :meth:`unpatch`, or ``with``.

    Attributes:
        changes: in the order in which they were made; grows as modeling files are imported.
        left_alone: names that look like those we know and are not what we know, with the reason.
    """

    def __init__(self, devices: frozenset[str]) -> None:
        self.devices = devices
        self.changes: list[Change] = []
        self.left_alone: list[Change] = []
        self._undo: list[Callable[[], None]] = []
        self._finder: _Finder | None = _Finder(self)
        sys.meta_path.insert(0, self._finder)
        for name, module in list(sys.modules.items()):
            if isinstance(module, ModuleType) and _MODELING.fullmatch(name):
                self.apply(module)

    @property
    def families(self) -> list[str]:
        """The model types in whose files something was changed."""
        return sorted({change.module.split(".")[2] for change in self.changes})

    def unpatch(self) -> None:
        """Put back every function that was there before, the same objects. Calling it again does nothing."""
        if self._finder is not None:
            sys.meta_path.remove(self._finder)
            self._finder = None
        while self._undo:
            self._undo.pop()()
        self.changes.clear()

    def apply(self, module: ModuleType) -> None:
        """Patch one modeling file; what is ours already stays as it is."""
        for name, stand_in in FUNCTIONS.items():
            original = vars(module).get(name)
            if original is None or hasattr(original, _MARK):
                continue
            if reason := _misfit(original, stand_in.run):
                self.left_alone.append(Change(module.__name__, name, reason))
                continue
            self._set(module, module, name, _function(original, stand_in, self.devices), stand_in.mends)
        for mend in METHODS.get(module.__name__.split(".")[2], ()):
            self._mend(module, mend)

    def _mend(self, module: ModuleType, mend: Mend) -> None:
        owner = vars(module).get(mend.owner)
        original = getattr(owner, mend.name, None)
        if original is None:
            reason = "not in this version of transformers"
            self.left_alone.append(Change(module.__name__, f"{mend.owner}.{mend.name}", reason))
        elif not hasattr(original, _MARK):
            made = _guarded(original, original, mend.make(original), self.devices)
            self._set(module, owner, mend.name, made, mend.mends)

    def _set(self, module: ModuleType, owner: Any, name: str, new: Any, mends: str) -> None:
        if name in vars(owner):
            self._undo.append(functools.partial(setattr, owner, name, vars(owner)[name]))
        else:  # inherited
            self._undo.append(functools.partial(delattr, owner, name))
        setattr(new, _MARK, True)
        setattr(owner, name, new)
        full = name if owner is module else f"{owner.__name__}.{name}"
        self.changes.append(Change(module.__name__, full, mends))

    def __iter__(self) -> Iterator[Change]:
        return iter(self.changes)

    def __len__(self) -> int:
        return len(self.changes)

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unpatch()

    def __str__(self) -> str:
        if self._finder is None:
            return "linstate: transformers is as it was"
        lines = [
            f"linstate: {len(self.changes)} changes in {len(self.families)} families of transformers, on "
            f"{', '.join(sorted(self.devices))}; modeling files that are imported later follow"
        ]
        for family in self.families:
            lines.append(f"  {family}")
            mine = [change for change in self.changes if change.module.split(".")[2] == family]
            lines.extend(f"    {change.name}: {change.mends}" for change in mine)
        lines.extend(f"  left alone: {c.module}.{c.name}: {c.mends}" for c in self.left_alone)
        return "\n".join(lines)

    __repr__ = __str__


def patch_transformers(*, devices: Iterable[str] = ("cpu",), quiet: bool = False) -> Patch:
    """Make Hugging Face's linear-attention models use our kernels and keep their state; in this process, until undone.

    Models built before and after, in prefill, decoding, generation and training. Nothing but the running process is changed.
    Under ``torch.compile`` and on other devices their own functions run.

    Args:
        devices: kinds of devices on which ours serve; ``("cpu", "cuda")`` replaces their CUDA kernels too.
        quiet: do not print what was changed.

    Returns:
        A :class:`Patch`. ``unpatch()``, or the end of a ``with`` block, puts everything back.

    Raises:
        ConfigError: transformers is not installed. ArgumentError: ``devices`` names none.

    Source: transformers 5.23; see ``docs/transformers.md``.

    >>> patch = patch_transformers(quiet=True)
    >>> patch.unpatch()
    >>> print(patch)
    linstate: transformers is as it was
    """
    chosen = frozenset([devices] if isinstance(devices, str) else devices)
    if not chosen:
        raise ArgumentError(
            'patch_transformers: devices must name at least one kind of device, such as "cpu"'
        )
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError(
            "patch_transformers needs the package transformers, which is not installed: pip install 'linstate[hf]'"
        )
    patch = Patch(chosen)
    if not quiet:
        print(patch)
    return patch


def _misfit(original: Any, ours: Callable[..., Any]) -> str | None:
    """Why ours cannot stand in for a function, or None: it must take every argument of theirs by its name."""
    if not callable(original):
        return "it is no function"
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    taken = inspect.signature(ours).parameters
    if all(p.kind not in named for p in taken.values()):  # takes all and any
        return None
    for position, (name, parameter) in enumerate(inspect.signature(original).parameters.items()):
        if parameter.kind not in named:
            continue
        if name not in taken:
            return f"it has an argument that ours does not know: {name}"
        if parameter.default is inspect.Parameter.empty and list(taken)[position] != name:
            return f"its arguments have another order than ours: {name}"
    return None


def _function(original: Any, stand_in: StandIn, devices: frozenset[str]) -> Callable[..., Any]:
    plain = getattr(original, "__wrapped__", original)  # without a kernel of another package

    @functools.wraps(plain)
    def compiled(*args: Any, **kwargs: Any) -> Any:
        if any(kwargs.get(name) is not None for name in _PACKED):
            raise ArgumentError(
                f"{plain.__name__}: packed sequences ({' or '.join(_PACKED)}) are not served under torch.compile on a CPU"
            )
        return plain(*args, **kwargs)

    return _guarded(original, compiled, stand_in.run, devices)


def _guarded(
    original: Any, compiled: Any, ours: Callable[..., Any], devices: frozenset[str]
) -> Callable[..., Any]:
    """``ours`` on these devices; ``compiled`` there under torch.compile; elsewhere ``original``."""

    @functools.wraps(getattr(original, "__wrapped__", original))
    def call(*args: Any, **kwargs: Any) -> Any:
        tensor = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
        if tensor is not None and tensor.device.type not in devices:
            return original(*args, **kwargs)
        if torch.compiler.is_compiling():
            return compiled(*args, **kwargs)
        return ours(*args, **kwargs)

    call.__wrapped__ = original
    return call


class _Finder(MetaPathFinder):
    """Finds modeling files as the finders behind it do, and has them patched once they have run."""

    def __init__(self, patch: Patch) -> None:
        self.patch = patch

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not _MODELING.fullmatch(fullname):
            return None
        later = sys.meta_path[sys.meta_path.index(self) + 1 :] if self in sys.meta_path else []
        for finder in later:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self.patch)
                return spec
        return None


class _Loader(Loader):
    """Runs a module with its own loader, leaves no trace in it, and patches it."""

    def __init__(self, loader: Loader, patch: Patch) -> None:
        self.loader, self.patch = loader, patch

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        if self.patch._finder is not None:
            self.patch.apply(module)
