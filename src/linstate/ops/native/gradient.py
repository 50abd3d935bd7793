"""The gradient of a native kernel: the torch form again, a segment at a time, so that memory is linear in T."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

SEGMENT = 1024
"""Tokens between the states that a call with a gradient keeps: a multiple of the chunk."""


def by_segments(
    form: Callable[..., tuple[Tensor, Tensor]],
    sequences: Mapping[str, Tensor | None],
    fixed: Mapping[str, Tensor | None],
    constants: Mapping[str, Any],
    before: Tensor | None,
    kept: Tensor,
    grad_o: Tensor,
    grad_state: Tensor,
    bounds: list[int] | None,
    every: int,
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor | None]:
    """Gradients of the arguments with a time axis that were given, of those without one, and of the initial state.

    From the last segment to the first; the state's gradient goes from each to the one before.

    Args:
        form: the torch form.
        constants: its arguments that are no tensors.
        before: the initial state. kept: ``[rows, H, T // every, K, V]``, the states every so many tokens.
    """
    given = {name: t for name, t in sequences.items() if t is not None}
    learned = {name: t.detach().requires_grad_() for name, t in fixed.items() if t is not None}
    grads = {name: torch.zeros_like(t) for name, t in given.items()}
    fixed_grads = {name: torch.zeros_like(t) for name, t in learned.items()}
    absent = dict.fromkeys((set(sequences) | set(fixed)) - set(given) - set(learned))
    starts = torch.zeros_like(grad_state)
    edges = bounds or [0, grad_o.shape[1]]
    for row, (first, last) in enumerate(zip(edges, edges[1:], strict=False)):
        entry = slice(row, row + 1) if bounds else slice(None)  # without bounds all batch entries go together
        grad_after = grad_state[entry]
        for number in reversed(range(-(-(last - first) // every))):
            begin, end = first + number * every, min(last, first + (number + 1) * every)
            piece = {name: t[:, begin:end].detach().requires_grad_() for name, t in given.items()}
            if number:
                state = kept[entry, :, number - 1]
            else:
                state = torch.zeros_like(grad_after) if before is None else before[entry]
            state = state.detach().requires_grad_()
            with torch.enable_grad():
                o, after = form(**piece, **learned, **absent, **constants, initial_state=state)
            found = torch.autograd.grad(
                (o, after),
                [*piece.values(), *learned.values(), state],
                (grad_o[:, begin:end], grad_after),
                allow_unused=True,
                materialize_grads=True,
            )
            for name, gradient in zip(piece, found, strict=False):
                grads[name][:, begin:end] = gradient
            for name, gradient in zip(learned, found[len(piece) :], strict=False):
                fixed_grads[name] += gradient
            grad_after = found[-1]
        starts[entry] = grad_after
    return grads, fixed_grads, None if before is None else starts
