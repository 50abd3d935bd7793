"""What is measured: one case for each recurrence and kind of gate, its inputs, our call, and its operations.

Operations are those of the chunked form, the same count for every implementation of a case, so that GFLOP/s compare like
times. A multiplication and an addition are two. C = 64 is the chunk. Products of which only a triangle is wanted are
counted by half; exp, norms and other work on single entries is not counted. Per token and head:

    reading the state S [K, V] with one row           2 K V
    adding an outer product to it                     2 K V
    scores of a row against its chunk, a triangle       K C
    scores times values, or a triangular solve          V C

so linear attention (1 row, 1 column) takes 4 K V + C (K + V), the delta rule (rows q and k, column k, one solve) 6 K V +
2 C (K + V), and diagonal plus low rank (rows q and b, columns a and k) 8 K V + 4 C (K + V). The scan takes 6 for each entry
of its state (g A; decay and add: 2; k v; read: 2), or 2 where K = 1 and q, k and A are not there; a convolution 2 W for
each channel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linstate.ops import causal_conv1d, delta_rule, dplr, linear_attention, native, selective_scan
from linstate.ops.chunks import CHUNK

Inputs = dict[str, Tensor]
CONV_WIDTH = 4
SCAN_STATE = 16
"""Entries of Mamba's state for each channel."""


@dataclass(frozen=True)
class Shape:
    """``[B, T, H, K]`` with values of V = K; a scan or a convolution has H V channels."""

    tokens: int = 4096
    heads: int = 16
    size: int = 128
    dtype: torch.dtype = torch.float32
    batch: int = 1

    @property
    def precision(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Case:
    """A recurrence with one kind of gate. ``call(inputs, **options)`` is ours; options as the op's.

    ``largest``: of K, where the architecture's heads are smaller than others'. ``beside_softmax``: whether a layer of
    softmax attention does the same job.
    """

    name: str
    model: str
    recurrence: str
    make: Callable[[Shape, torch.Generator], Inputs]
    call: Callable[..., tuple[Tensor, Tensor]]
    flops: Callable[[Shape], int]
    largest: int | None = None
    beside_softmax: bool = True

    def at(self, shape: Shape) -> Shape:
        """The shape in which this case is measured."""
        return shape if self.largest is None else replace(shape, size=min(shape.size, self.largest))

    def native(self, inputs: Inputs, isa: str, **options: Any) -> tuple[Tensor, Tensor]:
        """Our call with the native kernels of one instruction set; nothing is switched where it is the one in use."""
        if native.isa() == isa:
            return self.call(inputs, backend="native", **options)
        with native.using(isa):
            return self.call(inputs, backend="native", **options)

    def inputs(self, shape: Shape, device: str = "cpu") -> Inputs:
        """Always the same random numbers for the same shape, drawn on the device."""
        return self.make(self.at(shape), torch.Generator(device).manual_seed(0))


def _of_op(op: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Inputs that are named as the op's arguments."""
    return lambda inputs, **options: op(**inputs, **options)


def _normal(shape: Shape, random: torch.Generator, *last: int) -> Tensor:
    return torch.randn(shape.batch, shape.tokens, *last, generator=random, device=random.device).to(
        shape.dtype
    )


def _unit(shape: Shape, random: torch.Generator) -> Tensor:
    made = torch.randn(
        shape.batch, shape.tokens, shape.heads, shape.size, generator=random, device=random.device
    )
    return F.normalize(made, dim=-1).to(shape.dtype)


def _qkv(shape: Shape, random: torch.Generator) -> Inputs:
    return {
        "q": _unit(shape, random),
        "k": _unit(shape, random),
        "v": _normal(shape, random, shape.heads, shape.size),
    }


def _gate(shape: Shape, random: torch.Generator, kind: str) -> Inputs:
    """Log gates in float32, as the mixers make them: fast ones per head, slow ones per channel."""
    if kind == "none":
        return {}
    last = (shape.heads,) if kind == "head" else (shape.heads, shape.size)
    g = -torch.rand(shape.batch, shape.tokens, *last, generator=random, device=random.device)
    return {"g": g if kind == "head" else 0.1 * g}


def _linear(kind: str, *, bonus: bool = False) -> Callable[[Shape, torch.Generator], Inputs]:
    def make(shape: Shape, random: torch.Generator) -> Inputs:
        u = (
            {"bonus": torch.randn(shape.heads, shape.size, generator=random, device=random.device)}
            if bonus
            else {}
        )
        return {**_qkv(shape, random), **_gate(shape, random, kind), **u}

    return make


def _delta(kind: str) -> Callable[[Shape, torch.Generator], Inputs]:
    def make(shape: Shape, random: torch.Generator) -> Inputs:
        beta = torch.rand(shape.batch, shape.tokens, shape.heads, generator=random, device=random.device).to(
            shape.dtype
        )
        return {**_qkv(shape, random), "beta": beta, **_gate(shape, random, kind)}

    return make


def _rwkv7(shape: Shape, random: torch.Generator) -> Inputs:
    kappa = _unit(shape, random)
    rate = torch.rand(
        shape.batch, shape.tokens, shape.heads, shape.size, generator=random, device=random.device
    )
    a = (-kappa * rate).to(shape.dtype)
    return {**_qkv(shape, random), "a": a, "b": kappa, **_gate(shape, random, "channel")}


def _mamba2(shape: Shape, random: torch.Generator) -> Inputs:
    dt = torch.rand(shape.batch, shape.tokens, shape.heads, generator=random, device=random.device)
    return {
        **_qkv(shape, random),
        "dt": dt,
        "A": -torch.rand(shape.heads, generator=random, device=random.device),
    }


def _mamba2_call(inputs: Inputs, **options: Any) -> tuple[Tensor, Tensor]:
    v, dt = inputs["v"], inputs["dt"]
    written = v * dt.to(v.dtype)[..., None]
    return linear_attention(inputs["q"], inputs["k"], written, inputs["A"] * dt, scale=1.0, **options)


def _mamba(shape: Shape, random: torch.Generator) -> Inputs:
    channels = (shape.heads, shape.size)
    return {
        "q": _normal(shape, random, 1, SCAN_STATE),  # C, for all channels
        "k": _normal(shape, random, 1, SCAN_STATE),  # B
        "v": _normal(shape, random, *channels),
        "dt": torch.rand(shape.batch, shape.tokens, *channels, generator=random, device=random.device),
        "A": -torch.rand(shape.heads, SCAN_STATE, shape.size, generator=random, device=random.device),
    }


def _mamba_call(inputs: Inputs, **options: Any) -> tuple[Tensor, Tensor]:
    v, dt = inputs["v"], inputs["dt"]
    return selective_scan(inputs["q"], inputs["k"], v * dt.to(v.dtype), dt, inputs["A"], **options)


def _rglru(shape: Shape, random: torch.Generator) -> Inputs:
    v = _normal(shape, random, shape.heads, shape.size)
    return {"v": v, **_gate(shape, random, "channel")}


def _rglru_call(inputs: Inputs, **options: Any) -> tuple[Tensor, Tensor]:
    return selective_scan(None, None, inputs["v"], inputs["g"], **options)


def _conv(shape: Shape, random: torch.Generator) -> Inputs:
    channels = shape.heads * shape.size
    return {
        "x": _normal(shape, random, channels),
        "weight": torch.randn(channels, CONV_WIDTH, generator=random, device=random.device).to(shape.dtype),
    }


def _conv_call(inputs: Inputs, **options: Any) -> tuple[Tensor, Tensor]:
    return causal_conv1d(inputs["x"], inputs["weight"], activation="silu", **options)


def _counts(state: int, chunk: int) -> Callable[[Shape], int]:
    return lambda shape: state * shape.size**2 + chunk * CHUNK * 2 * shape.size


_LINEAR, _DELTA, _DPLR = _counts(4, 1), _counts(6, 2), _counts(8, 4)

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("delta_rule, no gate", "DeltaNet", "delta_rule", _delta("none"), _of_op(delta_rule), _DELTA),
        Case(
            "delta_rule, g per head",
            "Gated DeltaNet",
            "delta_rule",
            _delta("head"),
            _of_op(delta_rule),
            _DELTA,
        ),
        Case("delta_rule, g per channel", "KDA", "delta_rule", _delta("channel"), _of_op(delta_rule), _DELTA),
        Case(
            "linear_attention, no gate",
            "Linear Transformer",
            "linear_attention",
            _linear("none"),
            _of_op(linear_attention),
            _LINEAR,
        ),
        Case("linear_attention, g per head", "Mamba-2", "linear_attention", _mamba2, _mamba2_call, _LINEAR),
        Case(
            "linear_attention, g per channel",
            "GLA",
            "linear_attention",
            _linear("channel"),
            _of_op(linear_attention),
            _LINEAR,
        ),
        Case(
            "linear_attention, g per channel, bonus",
            "RWKV-6",
            "linear_attention",
            _linear("channel", bonus=True),
            _of_op(linear_attention),
            _LINEAR,
        ),
        Case("dplr, g per channel", "RWKV-7", "dplr", _rwkv7, _of_op(dplr), _DPLR, largest=64),
        Case(
            f"selective_scan, K = {SCAN_STATE}",
            "Mamba",
            "selective_scan",
            _mamba,
            _mamba_call,
            lambda shape: 6 * SCAN_STATE * shape.size,
        ),
        Case(
            "selective_scan, K = 1",
            "RG-LRU",
            "selective_scan",
            _rglru,
            _rglru_call,
            lambda shape: 2 * shape.size,
        ),
        Case(
            f"causal_conv1d, W = {CONV_WIDTH}, SiLU",
            "short convolution",
            "causal_conv1d",
            _conv,
            _conv_call,
            lambda shape: 2 * CONV_WIDTH * shape.size,
            beside_softmax=False,
        ),
    )
}
"""Every case, by its name."""
