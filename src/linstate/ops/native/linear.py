"""y = x W^T + b with a weight that is packed once for the machine: bf16, or codes of 8 or 4 bits.

The kernels are ``csrc/linear_panel.hpp``, the layout ``csrc/linear.hpp``. x enters the product as bf16, sums are float32. A
row's result does not depend on the rows beside it, but for codes and for AMX on whether there is one row or several.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from linstate.errors import ArgumentError, BackendError
from linstate.ops import native
from linstate.ops.native import lib, memory
from linstate.ops.native.program import note

Format = Literal["bf16", "int8", "int4"]
FORMATS: tuple[Format, ...] = get_args(Format)
BITS = {"bf16": 16, "int8": 8, "int4": 4}
_FORMATS = {name: getattr(lib.Format, name) for name in FORMATS if native.available}
PANEL = 32
"""Output columns that are packed together."""
_FEW = 16
"""Rows up to which :func:`rows` is one call, on one thread."""
GROUP = 32
"""Inputs that share a scale; the number of inputs is filled up to a multiple."""


@dataclass(frozen=True)
class Packed:
    """A weight ``[N, K]`` as the kernels read it.

    Attributes:
        words: int32 ``[panels, K' / (32 / bits), 32]``. scales: bf16 ``[panels, K' / 32, 32]``, None for bf16.
    """

    format: Format
    outputs: int
    inputs: int
    words: Tensor
    scales: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes that a decoded token reads."""
        return self.words.nbytes + (0 if self.scales is None else self.scales.nbytes)


def pack(weight: Tensor, format: Format = "bf16") -> Packed:
    """Pack ``weight [N, K]``: rounded to bf16, or to codes in units of a scale for every 32 inputs of an output.

    A scale is the largest number of its 32 over 127 (int8) or over -8, with its sign (int4), rounded to bf16 before the codes
    are. 16, 8.5 and 4.5 bits for a weight: what llama.cpp calls bf16, q8_0 and q4_0.

    Raises:
        ArgumentError: the weight is no matrix or not floating, the format is none of :data:`FORMATS`.
        BackendError: the native extension is not there.
    """
    if format not in BITS:
        raise ArgumentError(f"pack: format must be one of {', '.join(FORMATS)}, got {format!r}")
    if weight.dim() != 2 or not weight.is_floating_point() or not weight.numel():
        raise ArgumentError(f"pack: weight must be floating [N, K], got {weight.dtype} {list(weight.shape)}")
    if native.reason:
        raise BackendError(f"packed weights need the native kernels: {native.reason}")
    outputs, inputs = weight.shape
    panels, groups = -(-outputs // PANEL), -(-inputs // GROUP)
    words = memory.for_weights((panels, groups * BITS[format] * GROUP // 32, PANEL), torch.int32)
    scales = None
    if format != "bf16":
        scales = memory.for_weights((panels, groups, PANEL), torch.bfloat16)
    step = _panels_at_once(inputs)
    for at in range(0, panels, step):
        found, scale = _pack_rows(weight.detach()[at * PANEL : (at + step) * PANEL].cpu(), format)
        words[at : at + step] = _panels(found)
        if scales is not None and scale is not None:
            scales[at : at + step] = _panels(scale)
    return Packed(format, outputs, inputs, words, scales)


def _panels_at_once(inputs: int) -> int:
    """Panels of some quarter of a million weights: what is made of them on the way stays in the caches."""
    return max(1, (1 << 18) // (inputs * PANEL))


def _pack_rows(rows: Tensor, format: Format) -> tuple[Tensor, Tensor | None]:
    """Words ``[N', K' bits / 32]`` and scales ``[N', K' / 32]`` of some rows, filled up to whole panels and groups."""
    whole = F.pad(rows, (0, -rows.shape[1] % GROUP, 0, -rows.shape[0] % PANEL))  # [N', K']
    if format == "bf16":
        return whole.to(torch.bfloat16).view(torch.int32), None  # words [N', K' / 2]
    grouped = whole.float().unflatten(-1, (-1, GROUP))  # [N', K' / 32, 32]
    if format == "int8":
        scale = grouped.abs().amax(-1) / 127
    else:
        scale = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True)).squeeze(-1) / -8
    scale = scale.to(torch.bfloat16)
    unit = torch.where(scale == 0, 1, scale).float()
    half = 1 << (BITS[format] - 1)
    codes = (grouped / unit[..., None]).round().clamp(1 - half if format == "int8" else -half, half - 1)
    return _words((codes.to(torch.int32) + half).flatten(-2), BITS[format]), scale


def _panels(x: Tensor) -> Tensor:
    """``[N', n] -> [panels, n, 32]``, a view."""
    return x.unflatten(0, (-1, PANEL)).transpose(1, 2)


def _words(codes: Tensor, bits: int) -> Tensor:
    """Codes int32 ``[N', K']`` to words of 32 bits: even inputs in the lower half, odd ones in the upper, rising."""
    pairs = codes.unflatten(-1, (-1, 16 // bits, 2))  # [N', words, pairs, 2]
    return (pairs << _shifts(bits)).sum((-2, -1), dtype=torch.int32)


def _shifts(bits: int) -> Tensor:
    """Where in a word the codes of its inputs stand, ``[pairs, 2]``."""
    return torch.arange(16 // bits, dtype=torch.int32)[:, None] * bits + torch.tensor(
        [0, 16], dtype=torch.int32
    )


def unpack(packed: Packed) -> Tensor:
    """The weight bf16 ``[N, K]`` that a packed one stands for: exact for bf16, codes times scales rounded for the others."""
    whole = torch.empty(packed.outputs, packed.inputs, dtype=torch.bfloat16)
    at = 0
    for rows in unpacked_parts(packed):
        whole[at : at + len(rows)] = rows
        at += len(rows)
    return whole


def unpacked_parts(packed: Packed) -> Iterator[Tensor]:
    """:func:`unpack` in parts, ``[some rows, K]`` each, for whoever needs no second copy of all."""
    step = _panels_at_once(packed.inputs)
    for at in range(0, packed.words.shape[0], step):
        words = packed.words[at : at + step].transpose(1, 2).flatten(0, 1)  # [rows, words]
        scales = packed.scales
        if scales is not None:
            scales = scales[at : at + step].transpose(1, 2).flatten(0, 1)  # [rows, K' / 32]
        yield _decoded(packed, words, scales)[: packed.outputs - at * PANEL]


def rows(packed: Packed, ids: Tensor) -> Tensor:
    """Rows of the weight that a packed one stands for, ``ids [...] -> bf16 [..., K]``: an embedding. Raises IndexError."""
    if ids.numel() <= _FEW and ids.is_cpu and ids.is_contiguous() and ids.dtype is torch.int64:
        y = torch.empty((*ids.shape, packed.inputs), dtype=torch.bfloat16)
        format = _FORMATS[packed.format]
        call = (format, packed.outputs, packed.inputs, ids, packed.words, packed.scales, y)
        lib.embed(*call, 1)
        note("embed", call)
        return y
    panel, lane = ids // PANEL, ids % PANEL
    scales = None if packed.scales is None else packed.scales[panel, :, lane]  # [..., K' / 32]
    return _decoded(packed, packed.words[panel, :, lane], scales)  # [..., K]


def _decoded(packed: Packed, words: Tensor, scales: Tensor | None) -> Tensor:
    """Numbers bf16 ``[..., K]`` of ``words [..., words of a row]`` and ``scales [..., K' / 32]``."""
    if scales is None:
        whole = words.contiguous().view(torch.bfloat16)
    else:
        bits = BITS[packed.format]
        codes = (words[..., None, None] >> _shifts(bits) & (1 << bits) - 1) - (1 << (bits - 1))
        wide = scales.float().repeat_interleave(GROUP, -1)
        whole = (codes.flatten(-3).float() * wide).to(torch.bfloat16)
    return whole[..., : packed.inputs]


def linear(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """``x [..., K] -> [..., N]`` in the dtype of x (float32 or bf16), without gradients.

    Raises:
        ArgumentError: the last axis, dtype or device of x or bias does not fit the weight.
    """
    if x.shape[-1] != packed.inputs or not x.is_cpu or x.dtype not in (torch.float32, torch.bfloat16):
        raise ArgumentError(
            f"linear: x must be float32 or bfloat16 [..., {packed.inputs}] on the CPU, "
            f"got {x.dtype} {list(x.shape)} on {x.device}"
        )
    if bias is not None and (
        bias.shape != (packed.outputs,) or bias.dtype not in (torch.float32, torch.bfloat16)
    ):
        raise ArgumentError(
            f"linear: bias must be float32 or bfloat16 [{packed.outputs}], got {bias.dtype} {list(bias.shape)}"
        )
    y = torch.empty((*x.shape[:-1], packed.outputs), dtype=x.dtype)
    wide = packed.words.shape[1] * (32 // BITS[packed.format])  # K'
    if wide != packed.inputs:
        x = F.pad(x, (0, wide - packed.inputs))
    if x.dtype is not torch.bfloat16:
        x = x.to(torch.bfloat16)
    if (
        not x.is_contiguous() or x.data_ptr() % 4
    ):  # a slice may be without gaps and yet begin between two words
        x = _pairs(x)
    call = (
        _FORMATS[packed.format],
        x,
        packed.words,
        packed.scales,
        None if bias is None else bias.contiguous(),
        y,
    )
    lib.linear(*call, torch.get_num_threads())
    note("linear", call)
    return y


def _pairs(x: Tensor) -> Tensor:
    """``[rows, K]`` whose rows all begin at a whole word, as kernels read pairs of numbers at once."""
    x = x.reshape(-1, x.shape[-1])
    odd = x.data_ptr() % 4 or (len(x) > 1 and x.stride(0) % 2)
    return x.clone(memory_format=torch.contiguous_format) if odd or x.stride(-1) != 1 else x
