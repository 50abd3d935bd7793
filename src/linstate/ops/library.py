"""What ``torch.library`` knows of the recurrences: one operator each, for gradients, ``torch.compile`` and fake tensors.

A plain call goes to a backend's kernel directly and pays for none of this. Of a backend an operator wants three things: the kernel,
empty tensors like its outputs, and the kernel of its gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Kernels(NamedTuple):
    """One backend's kernels of a recurrence.

    Attributes:
        run: arguments of the operator but ``backend``.
        outputs: the same arguments; tensors like those that ``run`` returns, without work.
        backward: gradients of the operator's tensors in their order, as new tensors; of what is None an empty one.
        traced: whether ``backward`` is made of torch's own functions and asks autograd: then it is no operator itself.
    """

    run: Callable[..., tuple[Tensor, ...]]
    outputs: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., list[Tensor]]
    traced: bool = False


MATRIX: dict[str, Kernels] = {}
"""By backend: the recurrences on a matrix state, in chunks."""
SCAN: dict[str, Kernels] = {}
"""The elementwise scan."""
CONV: dict[str, Kernels] = {}
"""The short convolution."""


@torch.library.custom_op("linstate::matrix", mutates_args=())
def matrix(
    backend: str,
    recurrence: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    beta: Tensor | None,
    g: Tensor | None,
    bonus: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    bounds: list[int] | None,
    every: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """o, the states after the last tokens, and those that the backward pass wants every ``every`` tokens (0: none)."""
    tensors = (q, k, v, a, b, beta, g, bonus, initial_state)
    o, after, kept = MATRIX[backend].run(recurrence, *tensors, scale, bounds, every)
    return o, after, kept


@torch.library.custom_op("linstate::matrix_backward", mutates_args=())
def matrix_backward(
    backend: str,
    recurrence: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    beta: Tensor | None,
    g: Tensor | None,
    bonus: Tensor | None,
    initial_state: Tensor | None,
    kept: Tensor,
    grad_o: Tensor,
    grad_after: Tensor,
    scale: float,
    bounds: list[int] | None,
    every: int,
) -> list[Tensor]:
    """Gradients of the nine tensors of :func:`matrix`."""
    tensors = (q, k, v, a, b, beta, g, bonus, initial_state)
    return MATRIX[backend].backward(recurrence, *tensors, kept, grad_o, grad_after, scale, bounds, every)


@torch.library.custom_op("linstate::selective_scan", mutates_args=())
def selective_scan(
    backend: str,
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor,
    g: Tensor,
    A: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    bounds: list[int] | None,
    every: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`matrix`."""
    o, after, kept = SCAN[backend].run(q, k, v, g, A, initial_state, scale, bounds, every)
    return o, after, kept


@torch.library.custom_op("linstate::selective_scan_backward", mutates_args=())
def selective_scan_backward(
    backend: str,
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor,
    g: Tensor,
    A: Tensor | None,
    initial_state: Tensor | None,
    kept: Tensor,
    grad_o: Tensor,
    grad_after: Tensor,
    scale: float,
    bounds: list[int] | None,
    every: int,
) -> list[Tensor]:
    """Gradients of the six tensors of :func:`selective_scan`."""
    tensors = (q, k, v, g, A, initial_state)
    return SCAN[backend].backward(*tensors, kept, grad_o, grad_after, scale, bounds, every)


@torch.library.custom_op("linstate::causal_conv1d", mutates_args=())
def causal_conv1d(
    backend: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    activation: str | None,
    bounds: list[int] | None,
) -> tuple[Tensor, Tensor]:
    """y and the last W - 1 inputs."""
    y, after = CONV[backend].run(x, weight, bias, initial_state, activation, bounds)
    return y, after


@torch.library.custom_op("linstate::causal_conv1d_backward", mutates_args=())
def causal_conv1d_backward(
    backend: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    grad_y: Tensor,
    grad_after: Tensor,
    activation: str | None,
    bounds: list[int] | None,
) -> list[Tensor]:
    """Gradients of the four tensors of :func:`causal_conv1d`."""
    tensors = (x, weight, bias, initial_state)
    return CONV[backend].backward(*tensors, grad_y, grad_after, activation, bounds)


def _differentiate(forward: Any, backward: Any, kernels: dict[str, Kernels], tensors: slice) -> None:
    """Fakes and autograd of one operator, whose tensors stand at ``tensors`` among its arguments.

    Its outputs are the sequence, the state after it and, of some, the states that the backward pass wants.
    """
    first, last = tensors.start, tensors.stop

    @forward.register_fake  # type: ignore[untyped-decorator]
    def _(backend: str, *arguments: Any) -> Any:
        return kernels[backend].outputs(*arguments)

    @backward.register_fake  # type: ignore[untyped-decorator]
    def _(*arguments: Any) -> list[Tensor]:
        given = arguments[tensors]
        like = next(t for t in given if t is not None)
        return [like.new_empty(0) if t is None else t.new_empty(t.shape) for t in given]

    def remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.backend, *ctx.names = inputs[:first]
        ctx.rest = inputs[last:]
        ctx.save_for_backward(*inputs[tensors], *output[2:])
        ctx.shapes = [(t.shape, t.dtype) for t in output[:2]]
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        given, kept = saved[: last - first], saved[last - first :]
        like = next(t for t in given if t is not None)
        wanted = [
            like.new_zeros(shape, dtype=dtype) if gradient is None else gradient
            for gradient, (shape, dtype) in zip(gradients[:2], ctx.shapes, strict=True)
        ]
        arguments = (*ctx.names, *given, *kept, *wanted, *ctx.rest)
        of = kernels[ctx.backend]
        found = of.backward(*arguments) if of.traced else backward(ctx.backend, *arguments)
        mine = [None if t is None else gradient for t, gradient in zip(given, found, strict=True)]
        return *[None] * first, *mine, *[None] * len(ctx.rest)

    forward.register_autograd(differentiate, setup_context=remember)


_differentiate(matrix, matrix_backward, MATRIX, slice(2, 11))
_differentiate(selective_scan, selective_scan_backward, SCAN, slice(1, 7))
_differentiate(causal_conv1d, causal_conv1d_backward, CONV, slice(1, 5))
