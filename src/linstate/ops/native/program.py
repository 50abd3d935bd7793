"""Native calls that are recorded once and then repeated as one: a decoded token without Python, without allocations.

What runs inside :class:`Recording` runs as always; its native calls are noted with their buffers, which are kept. If nothing but native calls touched numbers (views are fine), the calls alone do the same work again, on whatever
the first buffer holds then: :class:`Program`. The one thing that is not repeated in place is a mixer's state: it is not mutated,
so each run reads states that it is given and writes new ones.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from linstate.errors import ArgumentError
from linstate.ops.native import lib, memory
from linstate.types import LayerState

_HARMLESS = frozenset(
    (
        "view",
        "_unsafe_view",
        "reshape",
        "split",
        "split_with_sizes",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
        "transpose",
        "t",
        "permute",
        "expand",
        "alias",
        "detach",
        "unbind",
        "unflatten",
        "narrow",
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
    )
)
"""Torch's functions that make memory or look at it otherwise, and compute nothing."""


_ALIGNED = 16
"""Numbers, a cache line: a state begins at one."""
_CACHE = 32 << 20
"""Bytes, about a last-level cache: where a token reads more, the state that it writes is not there any more at the next one."""


_ROOM = 64
"""Places that a growing state gets at least, to grow into."""


class _Local(threading.local):
    recording: Recording | None = None


_local = _Local()


def note(name: str, arguments: tuple[Any, ...]) -> None:
    """Called by every native call that can be repeated: its arguments (but threads)."""
    if _local.recording is not None:
        _local.recording.calls.append((name, arguments))


def note_state(name: str, arguments: tuple[Any, ...], states: tuple[Tensor | None, ...]) -> None:
    """As :func:`note`, for a call with states: each before and after, in the order in which the call takes them.

    A state that is longer after it, ``[B, S, ...] -> [B, S + 1, ...]``, keeps what it held: the call copies it where it has to.
    """
    if _local.recording is not None:
        _local.recording.states.append(states)
        note(name, arguments)


class Recording(TorchDispatchMode):
    """Notes the native calls of this thread while it is entered; ``whole``: nothing else computed."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.states: list[tuple[Tensor | None, ...]] = []
        self.foreign: list[str] = []

    @property
    def whole(self) -> bool:
        return not self.foreign

    def __enter__(self) -> Recording:
        _local.recording = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        _local.recording = None
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.__name__.split(".")[0]
        if name not in _HARMLESS:
            self.foreign.append(name)
        return func(*args, **(kwargs or {}))


class _Room:
    """Memory ``[1, places, ...]`` in which a state grows; of it, ``filled`` places have been written and change no more."""

    def __init__(self, places: Tensor, filled: int) -> None:
        self.places, self.filled = places, filled


class Program:
    """Recorded calls, to be run again. States are named as in a model's state."""

    def __init__(self) -> None:
        self._native = lib.Program()
        self._kept: list[Any] = []
        """Arguments of its calls: it knows their addresses."""
        self._slots: list[list[tuple[str | None, str | None]]] = []
        self._places: dict[str, tuple[torch.Size, tuple[int, ...], int]] = {}
        """Of the states in their memory: shape, strides, and where each begins."""
        self._counts: dict[str, int] = {}
        """The same of those that are one int64 number."""
        self._rooms: dict[str, _Room] = {}
        """Of the states that grow, each with the memory that the last one of that name is in."""
        self._numbers = 0
        self._weights = 0
        """Bytes."""

    def append(self, recording: Recording, before: LayerState, after: LayerState) -> bool:
        """Add what was recorded. False, and nothing is added, if it cannot be repeated by its native calls alone.

        Args:
            before, after: the states that the recorded work was given and returned, by the names that runs will use.
        """
        given, made = _names(before), _names(after)
        slots = [
            [
                (given.get(_mark(t)), made.get(_mark(new)))
                for t, new in zip(states[::2], states[1::2], strict=True)
            ]
            for states in recording.states
        ]
        found = {name for slot in slots for _, name in slot if name is not None}
        if any((name is None) != (other is None) for slot in slots for name, other in slot):
            return False
        if not recording.whole or found != after.keys() or found != before.keys():
            return False
        for name, arguments in recording.calls:
            getattr(self._native, name)(*arguments)
        self._kept.append(recording.calls)
        self._slots += slots
        for name, t in after.items():
            if t.shape != before[name].shape:
                self._rooms[name] = _Room(t, t.shape[1])
                continue
            if t.dtype is torch.int64:
                self._counts[name] = self._numbers // 2
            else:
                self._places[name] = t.shape, t.stride(), self._numbers
            self._numbers += -(-t.numel() * t.element_size() // (4 * _ALIGNED)) * _ALIGNED
        for name, arguments in recording.calls:
            if name == "linear":
                words = arguments[2]
                self._weights += words.nbytes
        return True

    def add(self, x: Tensor, y: Tensor, read: Tensor | None = None, *, fresh: bool = False) -> None:
        """``x += y``, y bf16, without gaps. Where x is float32, the sum is written to ``read`` in bf16, too; ``fresh``: x = y."""
        self._native.add(x, y, read, fresh)
        self._kept += [x, y, read]

    @property
    def length(self) -> int:
        """Its calls: neighbours that are run side by side are one."""
        return self._native.size

    def run(self, state: LayerState, threads: int, calls: int | None = None) -> LayerState:
        """Run the first ``calls`` calls (default: all) from ``state``; returns the states after, new tensors in one piece of memory."""
        numbers = memory.for_states(self._numbers)
        whole = numbers.view(torch.int64) if self._counts else numbers
        made = {name: numbers.as_strided(*place) for name, place in self._places.items()}
        made |= {name: whole[at : at + 1] for name, at in self._counts.items()}
        before: list[Tensor | None] = []
        after: list[Tensor | None] = []
        for slot in self._slots:
            places = None
            for name, name_after in slot:
                if name is None or name_after is None:
                    before.append(None)
                    after.append(None)
                    continue
                t = state[name]
                if name_after in self._rooms:
                    t = self._fitting(name, t, self._rooms[name_after].places, places)
                    places = t.shape[1]
                    room = self._room(name_after, t)
                    made[name_after] = room.places[:, : places + 1]
                    after.append(room.places)
                else:
                    place = self._places.get(name_after)
                    if place is not None and (t.shape != place[0] or t.dtype is not torch.float32):
                        t = t.float().expand(place[0])
                    after.append(made[name_after])
                before.append(t.contiguous())
        past = self._weights + 8 * self._numbers > _CACHE
        self._native.run(before, after, self.length if calls is None else calls, past, threads)
        return made

    @staticmethod
    def _fitting(name: str, t: Tensor, like: Tensor, places: int | None) -> Tensor:
        """A state that grows, as the call reads it: like another, and with as many places as the one before it in that call."""
        if len(t) != 1 or t.shape[2:] != like.shape[2:] or places not in (None, t.shape[1]):
            expected = [1, "S" if places is None else places, *like.shape[2:]]
            raise ArgumentError(f"the state's {name} must have the shape {expected}, got {list(t.shape)}")
        return t.to(like.dtype)

    def _room(self, name: str, t: Tensor) -> _Room:
        """Memory for ``t [1, S, ...]`` and a place behind it: that which it is in, if nobody has gone on there before."""
        room, places = self._rooms[name], t.shape[1]
        same = places > 0 and t.data_ptr() == room.places.data_ptr() and room.filled == places
        if not same or places == room.places.shape[1]:
            size = -(-(places + 1 + max(_ROOM, places // 8)) // 16) * 16
            room = self._rooms[name] = _Room(t.new_empty(1, size, *t.shape[2:]), places)
        room.filled = places + 1
        return room


def _mark(t: Tensor | None) -> int:
    """What a tensor is known by: where it lies; one without numbers by itself."""
    return 0 if t is None else t.data_ptr() or id(t)


def _names(state: LayerState) -> dict[int, str]:
    return {_mark(t): name for name, t in state.items()}
