"""Native calls that are recorded once and then repeated as one: a decoded token without Python, without allocations.

What runs inside :class:`Recording` runs as always; its native calls are noted with the addresses of their buffers, which
are kept. If nothing but native calls touched numbers (views are fine), the calls alone do the same work again, on whatever
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

from linstate.ops import native_memory
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


class _Local(threading.local):
    recording: Recording | None = None


_local = _Local()


def note(name: str, arguments: tuple[Any, ...], *kept: Any) -> None:
    """Called by every native call that can be repeated: its arguments (but threads), and what holds their addresses."""
    if _local.recording is not None:
        _local.recording.calls.append((name, arguments))
        _local.recording.kept.extend(kept)


def note_state(name: str, arguments: tuple[Any, ...], states: tuple[Tensor | None, ...], *kept: Any) -> None:
    """As :func:`note`, for a call with states: a convolution's tail before and after, another state before and after."""
    if _local.recording is not None:
        _local.recording.states.append(states)
        note(name, arguments, *kept, *states)


class Recording(TorchDispatchMode):
    """Notes the native calls of this thread while it is entered; ``whole``: nothing else computed."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.states: list[tuple[Tensor | None, ...]] = []
        self.kept: list[Any] = []
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


class Program:
    """Recorded calls, to be run again. States are named as in a model's state."""

    def __init__(self) -> None:
        import linstate._native as _native

        self._native = _native.Program()
        self._kept: list[Any] = []
        self._slots: list[tuple[str | None, ...]] = []
        self._places: dict[str, tuple[torch.Size, tuple[int, ...], int]] = {}
        """Of the states in their memory: shape, strides, and where each begins."""
        self._numbers = 0
        self._weights = 0
        """Bytes."""
        self.length = 0

    def append(self, recording: Recording, before: LayerState, after: LayerState) -> bool:
        """Add what was recorded. False, and nothing is added, if it cannot be repeated by its native calls alone.

        Args:
            before, after: the states that the recorded work was given and returned, by the names that runs will use.
        """
        given = {t.data_ptr(): name for name, t in before.items()}
        made = {t.data_ptr(): name for name, t in after.items()}
        slots = [
            tuple(
                None if t is None else names.get(t.data_ptr())
                for t, names in zip(states, (given, made, given, made), strict=True)
            )
            for states in recording.states
        ]
        found = {name for slot in slots for name in (slot[1], slot[3]) if name is not None}
        if not recording.whole or found != after.keys() or found != before.keys():
            return False
        for name, arguments in recording.calls:
            getattr(self._native, name)(*arguments)
        self._kept.append(recording.kept)
        self._slots += slots
        for name, t in after.items():
            self._places[name] = t.shape, t.stride(), self._numbers
            self._numbers += -(-t.numel() // _ALIGNED) * _ALIGNED
        for name, arguments in recording.calls:
            if name == "linear":
                bits, _, outputs, inputs = arguments[:4]
                self._weights += outputs * inputs * bits // 8
        self.length += len(recording.calls)
        return True

    def add(self, x: Tensor, y: Tensor, read: Tensor | None = None) -> None:
        """``x += y``, y bf16, without gaps. Where x is float32, the sum is written to ``read`` in bf16, too."""
        self._native.add(x.numel(), x.data_ptr(), y.data_ptr(), None if read is None else read.data_ptr())
        self._kept += [x, y, read]
        self.length += 1

    def run(self, state: LayerState, threads: int, calls: int | None = None) -> LayerState:
        """Run the first ``calls`` calls (default: all) from ``state``; returns the states after, new tensors in one piece of memory."""
        memory = native_memory.for_states(self._numbers)
        begin = memory.data_ptr()
        given, addresses = [], []
        for tail, tail_after, matrix, matrix_after in self._slots:
            for name, name_after in ((tail, tail_after), (matrix, matrix_after)):
                if name is None:
                    addresses.append(0)
                else:
                    t, shape = state[name], self._places[name][0]
                    if t.shape != shape or t.dtype is not torch.float32 or not t.is_contiguous():
                        t = t.float().expand(shape).contiguous()
                        given.append(t)
                    addresses.append(t.data_ptr())
                addresses.append(0 if name_after is None else begin + 4 * self._places[name_after][2])
        past = self._weights + 8 * self._numbers > _CACHE
        self._native.run(addresses, self.length if calls is None else calls, past, threads)
        return {name: memory.as_strided(*place) for name, place in self._places.items()}
