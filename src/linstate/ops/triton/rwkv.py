"""RWKV on a GPU: the token shift before the projections, and RWKV-7's time mix between them: a token in one launch, many in three."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from linstate.errors import ArgumentError, BackendError
from linstate.ops.tensors import dense, state_of
from linstate.ops.triton import matrix as matrix_ops
from linstate.ops.triton import table
from linstate.ops.triton.runtime import boundaries, launch, unfit

EPS = 1e-12
"""Of the length of the removal key."""


def shift(
    x: Tensor, before: Tensor | None, mix: Tensor, bounds: list[int] | None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """As :func:`linstate.ops.native.rwkv.shift`, one launch."""
    from linstate.ops.triton.kernels.rwkv import shift as program

    x, mix = dense(x), mix.contiguous()  # type: ignore[assignment]
    batch, tokens, size = x.shape
    rows = batch if bounds is None else len(bounds) - 1
    before = state_of("shift", before, (rows, 1, size), x.device)
    longest = tokens if bounds is None else max(e - b for b, e in zip(bounds, bounds[1:], strict=False))
    config = table.conv(size, min(longest, 8))  # all rates of a tile are in registers
    spans = max(1, -(-longest // config.chunk))
    y = x.new_empty((mix.shape[0], batch, tokens, size))
    after = x.new_empty((rows, 1, size), dtype=torch.float32)
    launch(
        program,
        rows * spans * -(-size // config.block),
        *(x, mix, y, before, after, None if bounds is None else boundaries(bounds, x.device)),
        *(x.stride(0), x.stride(1), tokens, spans, batch * tokens * size),
        D=size,
        M=mix.shape[0],
        BT=config.chunk,
        BD=config.block,
        START=before is not None,
        PACKED=bounds is not None,
        num_warps=config.warps,
    )
    return y.unbind(0), after


@dataclass(frozen=True)
class Operands:
    """The tensors of :func:`linstate.ops.native.rwkv.time_mix`, in its order."""

    r: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor
    rate: Tensor
    value_rate: Tensor | None
    first: Tensor | None
    gate: Tensor
    k_k: Tensor
    k_a: Tensor
    r_k: Tensor
    norm: Tensor
    norm_bias: Tensor | None

    def ready(self) -> Operands:
        """Without gaps."""
        given = (getattr(self, f.name) for f in fields(self))
        return Operands(*(None if t is None else t.contiguous() for t in given))  # type: ignore[arg-type]

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return tuple(getattr(self, f.name) for f in fields(self))


def time_mix(
    operands: Operands, eps: float, matrix: Tensor | None, bounds: list[int] | None
) -> tuple[Tensor, Tensor]:
    """As :func:`linstate.ops.native.rwkv.time_mix`."""
    of = operands.ready()
    rows, tokens, _ = of.r.shape
    heads, size = of.r_k.shape
    y = of.r.new_empty(of.r.shape)
    if of.first is not None and of.first.shape != of.v.shape:
        raise ArgumentError(
            f"the first layer's values must have the shape {list(of.v.shape)} of this layer's, got {list(of.first.shape)}"
        )
    states = rows if bounds is None else len(bounds) - 1
    matrix = state_of("matrix", matrix, (states, heads, size, size), of.r.device)
    if tokens == 1 and bounds is None:
        after = y.new_empty((rows, heads, size, size), dtype=torch.float32)
        _step(of, eps, y, matrix, after, None)
        return y, after
    r, k, v, decay, rate = (t.unflatten(-1, (heads, size)) for t in (of.r, of.k, of.v, of.decay, of.rate))
    more = matrix_ops.Fused(
        (of.k_k, of.k_a, of.value_rate, of.first),
        (EPS, 0.0, 0.0, 0.0, 0.0),
        {**dict.fromkeys(matrix_ops.OPTIONS, 0), "FUSED": True, "STEPPED": of.first is not None},
    )
    inputs = (r, k, v, rate, rate, None, decay)
    o, after, _ = matrix_ops.read(2, inputs, None, matrix, 1.0, bounds, 0, False, more)
    _behind(of, eps, o, y)
    return y, after


def step_in_slots(
    operands: Operands, eps: float, slots: Tensor, states: Tensor, *, out: Tensor | None = None
) -> Tensor:
    """One token for each row of a batch, as :func:`linstate.ops.triton.mixer.step_in_slots`: the state ``[slots, H, K, K]`` updated in place.

    Raises:
        ArgumentError: a shape or dtype does not fit. BackendError: Triton does not take these tensors.
    """
    of = operands.ready()
    rows, tokens, _ = of.r.shape
    heads, size = of.r_k.shape
    y = of.r.new_empty(of.r.shape) if out is None else out
    wanted = {
        "slots": (slots, (rows,), (torch.int32, torch.int64)),
        "states": (states, (states.shape[0], heads, size, size), (torch.float32,)),
        "out": (y, (rows, 1, heads * size), (of.r.dtype,)),
    }
    if tokens != 1:
        raise ArgumentError(f"step_in_slots takes one token a row, [B, 1, H K], got {list(of.r.shape)}")
    check_places(wanted, of.r.device)
    if why := unfit({"r": of.r, "states": states}):
        raise BackendError(f"step_in_slots: triton: {why}")
    _step(of, eps, y, states, states, slots)
    return y


def check_places(
    wanted: dict[str, tuple[Tensor, tuple[int, ...], tuple[torch.dtype, ...]]], device: torch.device
) -> None:
    """Raises ArgumentError for a tensor that has not the shape, a dtype and the device that it should have, or has gaps."""
    for argument, (tensor, shape, dtypes) in wanted.items():
        fits = tuple(tensor.shape) == shape and tensor.dtype in dtypes and tensor.is_contiguous()
        if not fits or tensor.device != device:
            kinds = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise ArgumentError(
                f"step_in_slots: {argument} must be {kinds} {list(shape)} without gaps on {device}, "
                f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )


def _step(
    of: Operands, eps: float, y: Tensor, before: Tensor | None, after: Tensor, slots: Tensor | None
) -> None:
    from linstate.ops.triton.kernels.rwkv import rwkv7_step

    heads, size = of.r_k.shape
    launch(
        rwkv7_step,
        of.r.shape[0] * heads,
        *(*of.tensors, y, before, after, slots, eps, EPS),
        H=heads,
        K=size,
        BK=table.power(size),
        MIXES=of.first is not None,
        BIAS=of.norm_bias is not None,
        START=before is not None,
        SLOTS=slots is not None,
        num_warps=4 if size <= 64 else 8,
    )


def _behind(of: Operands, eps: float, o: Tensor, y: Tensor) -> None:
    from linstate.ops.triton.kernels.rwkv import rwkv7_behind

    heads, size = of.r_k.shape
    count = of.r.shape[0] * of.r.shape[1]
    rows = max(1, table.FINISH // table.power(size))
    launch(
        rwkv7_behind,
        heads * -(-count // rows),
        *(o, of.r, of.k, of.v, of.rate, of.value_rate, of.first, of.gate, of.k_k, of.k_a, of.r_k),
        *(of.norm, of.norm_bias, y, count, eps, EPS),
        H=heads,
        K=size,
        BK=table.power(size),
        ROWS=rows,
        MIXES=of.first is not None,
        BIAS=of.norm_bias is not None,
        num_warps=4,
    )
