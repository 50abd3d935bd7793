"""The native chunked recurrences on a matrix state: from checked tensors to addresses, and the gradient.

``csrc/matrix.hpp`` has the kernels. They read inputs of any strides but the last, which must be dense, and write tensors
made here, so nothing overlaps. Forward is native; backward runs the chunked torch form again, a segment at a time from
the states that forward kept, so that memory is linear in T.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linstate.ops import native
from linstate.ops.dispatch import TABLE, Call, register

LARGEST = 256  # of K and V
CHUNK = 64
SEGMENT = 1024
"""Tokens between the states that a call with a gradient keeps: a multiple of the chunk."""
KINDS = ("linear_attention", "delta_rule", "dplr")
_NAMES = ("q", "k", "v", "a", "b", "beta", "g")
_DTYPES = (torch.float32, torch.bfloat16)


def refuses(call: Call) -> str | None:
    """Why these kernels do not take a call, or None."""
    if native.reason:
        return native.reason
    for name in (*_NAMES, "bonus", "initial_state"):
        tensor = call.get(name)
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            return f"{name} is on {tensor.device}"
        if tensor.dtype not in _DTYPES:
            return f"{name} is {tensor.dtype}, not float32 or bfloat16"
    if call["k"].shape[-1] > LARGEST or call["v"].shape[-1] > LARGEST:
        return f"K and V go up to {LARGEST}"
    return None


def chunked(
    kind: int,
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    initial_state: Tensor | None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    beta: Tensor | None = None,
    g: Tensor | None = None,
    bonus: Tensor | None = None,
    bounds: list[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """One of ``KINDS``; arguments as in the op, checked."""
    tensors = (q, k, v, a, b, beta, g, bonus, initial_state)
    given = [t for t in tensors if t is not None]
    plain = all(type(t) in (Tensor, torch.nn.Parameter) for t in given)
    learning = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    if plain and not learning and not torch.compiler.is_compiling():
        o, after, _ = run(kind, *tensors, scale, bounds, 0)
        return o, after
    o, after, _ = torch.ops.linstate.matrix(kind, *tensors, scale, bounds, SEGMENT if learning else 0)
    return o, after


def _place(t: Tensor | None) -> tuple[int, int, int, int, bool] | None:
    if t is None:
        return None
    strides = t.stride()
    return t.data_ptr(), strides[0], strides[1], strides[2], t.dtype is torch.bfloat16


def _dense(t: Tensor | None) -> Tensor | None:
    """The last of four axes dense; the others may have any stride."""
    return t if t is None or t.dim() == 3 or t.stride(3) == 1 or t.shape[3] == 1 else t.contiguous()


def run(
    kind: int,
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
    """The kernel: o, the state behind the last token, and ``[rows, Hv, T // every, K, V]`` the states every so many tokens."""
    import linstate._native as _native

    sequences = [_dense(t) for t in (q, k, v, a, b, beta, g)]
    batch, tokens, hv, v_dim = v.shape
    hk, k_dim = k.shape[2:]
    rows = batch if bounds is None else len(bounds) - 1
    o, after, kept = _outputs(v, k_dim, rows, every)
    edges = None if bounds is None else torch.tensor(bounds)
    before = None if initial_state is None else initial_state.contiguous()
    bonus = None if bonus is None else bonus.float().contiguous()
    _native.matrix(
        kind,
        (rows, tokens, hk, hv, hk if g is None else g.shape[2], k_dim, v_dim),
        tuple(map(_place, sequences)),
        0 if g is None else g.dim() - 2,  # of T and head, or of the channel too
        scale,
        None if edges is None else edges.data_ptr(),
        None if bonus is None else bonus.data_ptr(),
        None if before is None else before.data_ptr(),
        after.data_ptr(),
        _place(o),
        kept.data_ptr() if kept.numel() else None,
        every,
        kept.shape[2],
        torch.get_num_threads(),
    )
    return o, after, kept


def _outputs(v: Tensor, k_dim: int, rows: int, every: int) -> tuple[Tensor, Tensor, Tensor]:
    _, tokens, heads, v_dim = v.shape
    after = v.new_empty((rows, heads, k_dim, v_dim), dtype=torch.float32)
    kept = v.new_empty((rows, heads, tokens // every if every else 0, k_dim, v_dim), dtype=torch.float32)
    return v.new_empty(v.shape), after, kept


# For torch.compile, fake tensors and gradients; a plain call does not pay for it.
_matrix = torch.library.custom_op("linstate::matrix", run, mutates_args=())


@_matrix.register_fake
def _(
    kind: int,
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
    rows = v.shape[0] if bounds is None else len(bounds) - 1
    return _outputs(v, k.shape[-1], rows, every)


_SEQUENCES = ("q", "k", "v", "a", "b", "beta", "g")


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.kind, *tensors, ctx.scale, ctx.bounds, ctx.every = inputs
    ctx.save_for_backward(*tensors, output[2])


def _backward(ctx: Any, grad_o: Tensor, grad_state: Tensor, grad_kept: Tensor) -> tuple[Tensor | None, ...]:
    """The torch form again, segment by segment from the last to the first; the state's gradient goes from each to the one before."""
    *sequences, bonus, before, kept = ctx.saved_tensors
    given = {name: t for name, t in zip(_SEQUENCES, sequences, strict=True) if t is not None}
    v = given["v"]
    grads = {name: torch.zeros_like(t) for name, t in given.items()}
    grad_bonus = None if bonus is None else torch.zeros_like(bonus)
    starts = torch.zeros_like(grad_state)
    torch_form = TABLE[KINDS[ctx.kind], "chunked", "torch"].run
    bounds = ctx.bounds or [0, v.shape[1]]
    for row, (first, last) in enumerate(zip(bounds, bounds[1:], strict=False)):
        # without bounds all batch entries go through together
        entry = slice(None) if ctx.bounds is None else slice(row, row + 1)
        grad_after = grad_state[entry]
        for number in reversed(range(-(-(last - first) // ctx.every))):
            begin, end = first + number * ctx.every, min(last, first + (number + 1) * ctx.every)
            piece = {name: t[:, begin:end].detach().requires_grad_() for name, t in given.items()}
            if number:
                state = kept[entry, :, number - 1]
            else:
                state = torch.zeros_like(grad_after) if before is None else before[entry]
            state = state.detach().requires_grad_()
            extra = {} if ctx.kind else {"bonus": None if bonus is None else bonus.detach().requires_grad_()}
            if "g" not in piece:
                extra["g"] = None
            with torch.enable_grad():
                o, after = torch_form(**piece, **extra, scale=ctx.scale, initial_state=state)
            wanted = [*piece.values(), state, *(t for t in extra.values() if t is not None)]
            found = torch.autograd.grad(
                (o, after),
                wanted,
                (grad_o[:, begin:end], grad_after),
                allow_unused=True,
                materialize_grads=True,
            )
            for (name, _), gradient in zip(piece.items(), found, strict=False):
                grads[name][:, begin:end] = gradient
            grad_after = found[len(piece)]
            if grad_bonus is not None:
                grad_bonus += found[-1]
        starts[entry] = grad_after
    by_place = [grads.get(name) for name in _SEQUENCES]
    return None, *by_place, grad_bonus, None if before is None else starts, None, None, None


_matrix.register_autograd(_backward, setup_context=_remember)


def register_chunked(kind: int) -> None:
    """Enter the kernel of one of ``KINDS`` into the backend table."""

    @register(KINDS[kind], "chunked", "native", refuses=refuses, packs=True)
    def native_chunked(**arguments: Any) -> tuple[Tensor, Tensor]:
        return chunked(kind, **arguments)


for _kind in range(len(KINDS)):
    register_chunked(_kind)
