"""The sizes of a chunked call, how it is cut into segments, and the states between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linstate.ops.dispatch import snapshot_count
from linstate.ops.triton import runtime, table
from linstate.ops.triton.runtime import boundaries, launch, operand, precision


def strides(t: Tensor | None) -> tuple[int, int, int]:
    """Of batch, time and head, of a sequence ``[B, T, H, ...]``."""
    return (0, 0, 0) if t is None else (t.stride(0), t.stride(1), t.stride(2))


class Problem:
    """The sizes of a call and what every program of it is told."""

    def __init__(self, kind: int, k: Tensor, v: Tensor, g: Tensor | None, bounds: list[int] | None) -> None:
        self.kind, self.bounds = kind, bounds
        self.batch, self.tokens, self.hv, self.v = v.shape
        self.hk, self.k = k.shape[2:]
        self.gate = 0 if g is None else g.dim() - 2
        self.hg = self.hv if g is None else g.shape[2]
        self.rows = self.batch if bounds is None else len(bounds) - 1
        pairs = zip(bounds, bounds[1:], strict=False) if bounds else ()
        self.lengths = [end - begin for begin, end in pairs] or [self.tokens]
        self.longest = max(self.lengths)
        self.device, self.dtype = v.device, v.dtype
        self.wide = v.dtype != torch.bfloat16  # operands of matmuls are float32
        self.edges = None if bounds is None else boundaries(bounds, v.device)

    def options(self, config: table.Config) -> dict[str, Any]:
        """What is fixed when a program is compiled."""
        return {
            "HV": self.hv,
            "Q_GROUP": self.hv // self.hk,
            "K": self.k,
            "V": self.v,
            "BK": table.padded(self.k),
            "BV": config.block,
            "KIND": self.kind,
            "GATE": self.gate,
            "PACKED": self.bounds is not None,
            "DT": operand(self.dtype),
            "PRECISION": precision(self.dtype),
            "num_warps": config.warps,
            "num_stages": config.stages,
        }

    def by_chunks(self, config: table.Config) -> dict[str, Any]:
        """The same for programs that make what a chunk needs themselves."""
        levels = config.chunk.bit_length() - 1
        more = {"G_GROUP": self.hv // self.hg, "C": config.chunk, "LEVELS": levels}
        return {**self.options(config), **more}

    def states(self, rows: int) -> Tensor:
        return torch.empty((rows, self.hv, self.k, self.v), dtype=torch.float32, device=self.device)

    def slots(self, every: int, *, whole: bool) -> tuple[list[int], int]:
        """Where the states (or chunks) of each row begin among all, and how many a row has at most.

        A row has one for each ``every`` tokens; ``whole``: the last one may be short.
        """
        counts = [-(-n // every) if whole else n // every for n in self.lengths]
        if self.bounds is None:
            return [row * counts[0] for row in range(self.rows + 1)], counts[0]
        base = [0]
        for count in counts:
            base.append(base[-1] + count)
        return base, max(counts)

    def segments(self, config: table.Config, every: int = 0) -> tuple[int, int]:
        """(number, tokens of each); a multiple of ``every`` as well."""
        programs = self.rows * self.hv * -(-self.v // config.block)
        count = runtime.processors(self.device.index if self.device.type == "cuda" else None)
        return table.segments(programs, self.longest, count, max(config.chunk, every), kind=self.kind)

    def transitions(self, segments: int) -> Tensor:
        """Room for P of every segment: K decays in linear attention, else a matrix."""
        last = (self.k,) if self.kind == 0 else (self.k, self.k)
        return torch.empty((self.rows * segments, self.hv, *last), dtype=torch.float32, device=self.device)

    def columns(self, config: table.Config, *, summary: bool = False) -> int:
        """Blocks of columns that programs share, those of P among them."""
        extra = -(-self.k // config.block) if summary and self.kind > 0 else 0
        return -(-self.v // config.block) + extra


def snapshots(kept: Tensor, after: Tensor, tokens: int, bounds: list[int] | None, every: int) -> Tensor:
    """``[rows, N, H, K, V]``: of each row its kept states ``[sum of T // every, H, K, V]``, and the final one in the place of those it has not."""
    edges = bounds or [0, tokens]
    found = after[:, None].repeat(1, snapshot_count(edges, every), *(1,) * (after.dim() - 1))
    if bounds is None:
        count = tokens // every
        found[:, :count] = kept.unflatten(0, (after.shape[0], count)) if count else found[:, :0]
        return found
    at = 0
    for row, (begin, end) in enumerate(zip(edges, edges[1:], strict=False)):
        count = (end - begin) // every
        found[row, :count] = kept[at : at + count]
        at += count
    return found


def combine(
    problem: Problem,
    increments: Tensor,
    transitions: Tensor,
    start: Tensor | None,
    segments: int,
    segment: int,
    *,
    backward: bool,
) -> Tensor:
    """The states before every segment, ``[rows * segments, HV, K, V]``; backward, behind every segment.

    ``increments, transitions``: H and P of every segment; P is a matrix ``[K, K]``, a factor for each k, or one for each entry ``[K, V]``.
    """
    from linstate.ops.triton.kernels.matrix import combine as program

    starts = torch.empty_like(increments)
    keys = table.padded(problem.k)
    block = max(16, min(table.padded(problem.v), 4096 // keys, 64))
    if transitions.dim() == 3:
        kind = 1
    else:
        kind = 2 if problem.kind > 0 else 0
    launch(
        program,
        problem.rows * problem.hv * -(-problem.v // block),
        *(increments, transitions, start, starts, problem.edges, problem.tokens, segment, segments),
        HV=problem.hv,
        K=problem.k,
        V=problem.v,
        BK=keys,
        BV=block,
        PART=keys if keys <= 128 else 32,
        TRANSITION=kind,
        START=start is not None,
        PACKED=problem.bounds is not None,
        BACKWARD=backward,
        DT=operand(problem.dtype),
        PRECISION="tf32x3",
        num_warps=8 if kind == 2 else 4,
    )
    return starts
