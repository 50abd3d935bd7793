"""The backend table: (recurrence, form, backend) -> kernel, and how one is chosen.

A kernel registers itself with :func:`register`. ``refuses`` looks at the call and answers with a
reason, or None when the kernel takes it. ``auto`` walks :data:`BACKENDS` from the fastest to the one
that accepts everything; ``LINSTATE_LOG=ops`` prints each choice and each reason of a refusal once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from linstate.errors import ArgumentError, BackendError
from linstate.ops.checks import check_cu_seqlens
from linstate.types import state_dtype

BACKENDS = ("triton", "native", "torch")
FORMS = ("recurrent", "chunked", "step")
GRID = 64
"""Tokens of a chunk: where the chunked forms have a state to show."""

Call = dict[str, Any]


@dataclass(frozen=True)
class Kernel:
    """One entry of the table.

    ``run`` takes the op's arguments by name (checked, gates in canonical shapes, heads not yet expanded)
    and returns ``(o, state)``. ``packs`` says that it takes ``bounds`` (a packed call) itself, ``keeps`` which
    calls with ``snapshots``.
    """

    recurrence: str
    form: str
    backend: str
    run: Callable[..., Any]
    refuses: Callable[[Call], str | None] = field(default=lambda call: None)
    packs: bool = False
    keeps: Callable[[Call], bool] = field(default=lambda call: False)


TABLE: dict[tuple[str, str, str], Kernel] = {}


def register(
    recurrence: str,
    form: str,
    backend: str,
    *,
    refuses: Callable[[Call], str | None] | None = None,
    packs: bool = False,
    keeps: Callable[[Call], bool] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator that enters a kernel into the table."""

    def enter(run: Callable[..., Any]) -> Callable[..., Any]:
        kernel = Kernel(
            recurrence,
            form,
            backend,
            run,
            refuses or (lambda call: None),
            packs,
            keeps or (lambda call: False),
        )
        TABLE[recurrence, form, backend] = kernel
        return run

    return enter


_said: set[str] = set()


def _log(line: str) -> None:
    if "ops" in os.environ.get("LINSTATE_LOG", "").split(",") and line not in _said:
        _said.add(line)
        print(f"linstate.ops: {line}", file=sys.stderr)


_watching: list[list[tuple[str, str, str]]] = []


@contextmanager
def recorded() -> Iterator[list[tuple[str, str, str]]]:
    """(recurrence, form, backend) of every kernel that is chosen meanwhile, in order: what ran is what this says."""
    seen: list[tuple[str, str, str]] = []
    _watching.append(seen)
    try:
        yield seen
    finally:
        _watching.remove(seen)


def choose(recurrence: str, form: str, backend: str, call: Call) -> Kernel:
    """The kernel that serves a call. Raises ArgumentError for unknown names, BackendError for a refusal."""
    if backend != "auto" and backend not in BACKENDS:
        raise ArgumentError(
            f"{recurrence}: backend must be 'auto' or one of {', '.join(BACKENDS)}, got {backend!r}"
        )
    if form != "auto" and form not in FORMS:
        raise ArgumentError(f"{recurrence}: form must be 'auto' or one of {', '.join(FORMS)}, got {form!r}")
    tokens = call["tokens"]
    if form == "auto":
        form = "step" if tokens == 1 and "bounds" not in call else "chunked"
    if form == "step" and (tokens != 1 or "bounds" in call):
        raise ArgumentError(f"{recurrence}: form 'step' takes one token (T=1, no cu_seqlens), got T={tokens}")
    reasons: list[str] = []
    for name in BACKENDS if backend == "auto" else (backend,):
        kernel = TABLE.get((recurrence, form, name))
        reason = "no such kernel" if kernel is None else kernel.refuses(call)
        if kernel is not None and reason is None:
            for seen in _watching:
                seen.append((recurrence, form, name))
            if "LINSTATE_LOG" in os.environ:
                _log(f"{recurrence} {form}: {name}" + (f" ({'; '.join(reasons)})" if reasons else ""))
            return kernel
        reasons.append(f"{name}: {reason}")
    raise BackendError(f"{recurrence} {form}: no backend takes this call ({'; '.join(reasons)})")


def run(
    recurrence: str,
    form: str,
    backend: str,
    *,
    sequences: dict[str, Tensor | None],
    fixed: Call,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    snapshots: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose a kernel and call it; packed calls that it cannot take are run sequence by sequence.

    Args:
        sequences: arguments with a time axis, ``[B, T, ...]``.
        fixed: arguments without one.
        snapshots: as in :func:`linstate.ops.linear_attention`. A kernel that does not keep states on its way is
            called for the tokens between two of them.
    """
    if snapshots is not None:
        form = _check_snapshots(recurrence, form, snapshots)
    first = next(t for t in sequences.values() if t is not None)
    call: Call = {
        **sequences,
        **fixed,
        "initial_state": initial_state,
        "tokens": first.shape[1],
        "asked": backend,
    }
    bounds = None
    if cu_seqlens is not None:
        bounds = check_cu_seqlens(recurrence, cu_seqlens, first.shape[0], first.shape[1])
        if initial_state is not None and initial_state.shape[0] != len(bounds) - 1:
            raise ArgumentError(
                f"{recurrence}: initial_state must hold one state for each of the {len(bounds) - 1} packed sequences, "
                f"got {initial_state.shape[0]}"
            )
        call["bounds"] = bounds
    kernel = choose(recurrence, form, backend, call)
    asked = {} if snapshots is None else {"snapshots": snapshots}
    keeps = not asked or kernel.keeps(call)
    if keeps and bounds is None:
        return kernel.run(**sequences, **fixed, initial_state=initial_state, **asked)
    if keeps and kernel.packs:
        return kernel.run(**sequences, **fixed, initial_state=initial_state, bounds=bounds, **asked)
    edges = bounds or [0, first.shape[1]]
    count = 0 if snapshots is None else snapshot_count(edges, snapshots)
    outputs: list[Tensor] = []
    states: list[Tensor] = []
    for row, (start, end) in enumerate(zip(edges, edges[1:], strict=False)):
        entry = slice(row, row + 1) if bounds else slice(None)  # without bounds all batch entries go together
        state = None if initial_state is None else initial_state[entry]
        passed: list[Tensor] = []
        for begin in range(start, max(end, start + 1), snapshots or max(end - start, 1)):
            piece = slice(begin, min(end, begin + snapshots) if snapshots else end)
            part = {name: None if t is None else t[:, piece] for name, t in sequences.items()}
            o, state = kernel.run(**part, **fixed, initial_state=state)
            outputs.append(o)
            passed.append(state)
        passed += passed[-1:] * (count - len(passed))
        states.append(torch.stack(passed, dim=1) if snapshots else passed[-1])
    return torch.cat(outputs, dim=1), torch.cat(states, dim=0)


def _check_snapshots(recurrence: str, form: str, snapshots: int) -> str:
    """The form that serves a call with snapshots. Raises ArgumentError."""
    if isinstance(snapshots, bool) or not isinstance(snapshots, int) or snapshots < 1 or snapshots % GRID:
        raise ArgumentError(
            f"{recurrence}: snapshots must be None or a positive multiple of {GRID} tokens, the chunk, got {snapshots!r}"
        )
    if form == "step":
        raise ArgumentError(
            f"{recurrence}: form 'step' takes one token and has no snapshots; use 'chunked' or 'auto'"
        )
    return "chunked" if form == "auto" else form


def snapshot_count(bounds: list[int], every: int) -> int:
    """How many states a call with snapshots returns for each sequence: those of the longest, at least one."""
    longest = max(end - start for start, end in zip(bounds, bounds[1:], strict=False))
    return max(1, -(-longest // every))


def expand_heads(heads: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Repeat ``[B, T, H, ...]`` tensors along H so that each has ``heads`` heads (grouped heads)."""
    return tuple(
        t if t.shape[2] == heads else t.repeat_interleave(heads // t.shape[2], dim=2) for t in tensors
    )


def begin_state(initial_state: Tensor | None, k: Tensor, v: Tensor) -> Tensor:
    """The matrix state to begin from: ``initial_state``, or zeros ``[B, Hv, K, V]`` for ``k [B, T, Hk, K]``, ``v [B, T, Hv, V]``."""
    dtype = state_dtype(k, v)
    if initial_state is not None:
        return initial_state.to(dtype)
    return v.new_zeros((v.shape[0], v.shape[2], k.shape[-1], v.shape[-1]), dtype=dtype)
