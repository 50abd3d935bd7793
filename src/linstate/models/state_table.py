"""What a state of a model may hold, tensor by tensor: a state from outside is held against it before anything is computed.

Kernels make addresses and sizes of shapes and of whole numbers (how many places of a cache are in use), so neither is
believed: names, dtypes, shapes and ranges are those of the model, or the state is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch

from linstate.errors import StateMismatchError
from linstate.types import LayerState, Range, StateLike

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""Dtypes of the numbers of a state, which :func:`linstate.state.precision.encode` may have made narrower."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a state.

    Attributes:
        shape: its sizes; None where it grows with the text (the places of a KV cache).
        range: smallest and largest value of an integer tensor; a name stands for the places of that tensor. None: floats.
    """

    shape: tuple[int | None, ...]
    range: Range | None = None

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of ``shape`` can be this one."""
        return len(shape) == len(self.shape) and all(
            n in (None, m) for n, m in zip(self.shape, shape, strict=True)
        )


class StateTable(Mapping[str, Entry]):
    """Name -> :class:`Entry` for every tensor of a model's state with one row.

    Args:
        empty: the model's empty state (on the device ``meta``): an axis without places grows, if it is none of ``windows``.
        windows: tensors whose places are fixed, be they none.
        ranges: of its integer tensors, by name; a tensor that bounds another is named as beside it.
    """

    def __init__(self, empty: LayerState, ranges: Mapping[str, Range], windows: Collection[str] = ()) -> None:
        self._entries: dict[str, Entry] = {}
        for name, tensor in empty.items():
            held = None
            if not tensor.is_floating_point():
                low, high = ranges[name]
                held = (low, _beside(name, high) if isinstance(high, str) else high)
            shape = tuple(tensor.shape) if name in windows else tuple(n or None for n in tensor.shape)
            self._entries[name] = Entry(shape, held)

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def check_shape(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, what: str) -> None:
        """One tensor's shape and dtype, before it is made or used. Raises StateMismatchError."""
        entry = self._entries.get(name)
        if entry is None:
            raise StateMismatchError(f"{what}: it holds other tensors than the model's state ({name!r})")
        if not entry.fits(shape):
            expected = ["any" if n is None else n for n in entry.shape]
            raise StateMismatchError(
                f"{what}: its tensor {name!r} has the shape {list(shape)}, the model's has {expected}"
            )
        if dtype not in (FLOATS if entry.range is None else (torch.int64,)):
            raise StateMismatchError(f"{what}: its tensor {name!r} is {dtype}, which the model's is not")

    def check(self, tensors: StateLike, what: str) -> None:
        """A whole state: names, shapes, dtypes, and whole numbers in their ranges.

        Raises:
            StateMismatchError: naming the tensor, what is expected, and what ``what`` holds.
        """
        if tensors.keys() != self._entries.keys():
            odd = sorted(tensors.keys() ^ self._entries.keys())[0]
            raise StateMismatchError(f"{what}: it holds other tensors than the model's state ({odd!r})")
        for name, tensor in tensors.items():
            self.check_shape(name, tuple(tensor.shape), tensor.dtype, what)
        places: dict[str, int] = {}
        for name, entry in self._entries.items():
            if entry.range is not None:
                self._check_range(name, entry.range, tensors, what)
            if None in entry.shape:
                found = tensors[name].shape[entry.shape.index(None)]
                if places.setdefault(name.rpartition(".")[0], found) != found:
                    raise StateMismatchError(
                        f"{what}: the caches beside {name!r} are not equally long; it is damaged or was altered"
                    )

    def _check_range(self, name: str, held: Range, tensors: StateLike, what: str) -> None:
        low, high = held
        most = tensors[high].shape[1] if isinstance(high, str) else high
        found = tensors[name]
        if found.numel() and not low <= int(found.min()) <= int(found.max()) <= most:
            raise StateMismatchError(
                f"{what}: its {name!r} is {found.flatten().tolist()[:4]}, expected {low} to {most}; it is damaged or was altered"
            )


def _beside(name: str, other: str) -> str:
    """The full name of the tensor ``other`` beside ``name``."""
    return f"{name.rpartition('.')[0]}.{other}"
