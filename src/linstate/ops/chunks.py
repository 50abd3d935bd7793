"""Parts of the chunked torch forms: the chunk layout, decays inside a chunk, and the triangular solve.

Numerics. A decay is only ever applied as ``exp`` of a sum of log gates over an interval, and such a sum
is <= 0. Scalar gates: the sums are differences of a float64 cumulative sum. Gates per channel: ``exp(G_i -
G_j)`` cannot be split over i and j without an ``exp`` of a positive number on one side, so the chunk is
split in halves again and again (:class:`ChannelDecay`): between the halves of a block the boundary is a
reference point that lies after every j and before every i, so both factors are <= 1 and are sums without
cancellation. Nothing of size T x C x K is formed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

CHUNK = 64
SEGMENT_ELEMENTS = 1 << 19
"""Elements of q, or of k, that are worked on at once on a CPU: 2 MB of float32."""


def to_chunks(x: Tensor, dtype: torch.dtype, chunk: int = CHUNK) -> Tensor:
    """``[B, T, H, ...] -> [B, H, N, C, ...]`` in ``dtype``, the tail filled with zeros (neutral tokens)."""
    x = x.transpose(1, 2).to(dtype)  # [B, H, T, ...]
    short = -x.shape[2] % chunk
    if short:
        x = F.pad(x, [0, 0] * (x.dim() - 3) + [0, short])
    return x.unflatten(2, (-1, chunk)).contiguous()  # [B, H, N, C, ...]


def from_chunks(x: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
    """``[B, H, N, C, V] -> [B, T, H, V]``, without the filled tail."""
    return x.flatten(2, 3)[:, :, :tokens].transpose(1, 2).to(dtype)


def by_segments(
    core: Callable[..., tuple[Tensor, Tensor]], sequences: dict[str, Tensor | None], state: Tensor
) -> tuple[Tensor, Tensor]:
    """Run ``core(**sequences, state=...)`` over pieces of the sequences, the state carried.

    A piece is as long as fits into a CPU's cache with all that is made of it (on a GPU longer), so memory is
    bounded whatever T is, and twice the speed is gained (``docs/log.md``).
    """
    first = next(t for t in sequences.values() if t is not None)
    budget = SEGMENT_ELEMENTS if first.device.type == "cpu" else SEGMENT_ELEMENTS * 64
    segment = max(CHUNK, budget // max(1, first[:, :1].numel()) // CHUNK * CHUNK)
    if first.shape[1] <= segment:
        return core(**sequences, state=state)
    outputs = []
    for start in range(0, first.shape[1], segment):
        piece = {name: None if t is None else t[:, start : start + segment] for name, t in sequences.items()}
        o, state = core(**piece, state=state)
        outputs.append(o)
    return torch.cat(outputs, dim=1), state


class _UnitLowerInverse(torch.autograd.Function):
    """``(I + L)^-1`` for strictly lower ``L [..., C, C]``; backward is two matmuls instead of two solves."""

    @staticmethod
    def forward(ctx: FunctionCtx, lower: Tensor) -> Tensor:
        eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
        inverse = torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False, unitriangular=True)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors  # type: ignore[attr-defined]
        transposed = inverse.transpose(-1, -2)
        return -(transposed @ grad @ transposed).tril(-1)


def unit_lower_inverse(lower: Tensor) -> Tensor:
    """``(I + L)^-1`` for a strictly lower triangular ``L [..., C, C]``."""
    inverse: Tensor = _UnitLowerInverse.apply(lower)
    return inverse


class NoDecay:
    """Decays of a chunk without gates: all are one."""

    def scores(self, rows: Tensor, cols: Tensor, *, before: bool = False, diagonal: bool = True) -> Tensor:
        """Decayed products ``s_ij = rows_i . (exp(G_i - G_j) cols_j)`` for j <= i (j < i without ``diagonal``).

        With ``before`` row i stands before the decay of its own token: ``exp(G_{i-1} - G_j)``, j < i.
        ``rows, cols [..., C, K] -> [..., C, C]``, zero above the diagonal.
        """
        return (rows @ cols.transpose(-1, -2)).tril(0 if diagonal and not before else -1)

    def from_start(self, rows: Tensor, *, before: bool = False) -> Tensor:
        """``exp(G_i) rows_i``, or ``exp(G_{i-1}) rows_i`` with ``before``."""
        return rows

    def to_end(self, cols: Tensor) -> Tensor:
        """``exp(G_C - G_j) cols_j``."""
        return cols

    def total(self) -> Tensor | None:
        """``exp(G_C)``, broadcastable to the state ``[B, H, N, K, V]``; None stands for one."""
        return None


class ScalarDecay(NoDecay):
    """One log gate per token and head, ``g [B, H, N, C]``, <= 0."""

    def __init__(self, g: Tensor) -> None:
        self.dtype = g.dtype
        self.cumulative = g.double().cumsum(-1)  # [B, H, N, C]
        self.exclusive = F.pad(self.cumulative[..., :-1], (1, 0))

    def _between(self, later: Tensor) -> Tensor:
        return (later[..., :, None] - self.cumulative[..., None, :]).to(self.dtype)  # [B, H, N, C, C]

    def scores(self, rows: Tensor, cols: Tensor, *, before: bool = False, diagonal: bool = True) -> Tensor:
        log = self._between(self.exclusive if before else self.cumulative)
        keep = torch.ones(log.shape[-2:], dtype=torch.bool, device=log.device).tril(
            0 if diagonal and not before else -1
        )
        return (rows @ cols.transpose(-1, -2)) * log.masked_fill(~keep, float("-inf")).exp()

    def from_start(self, rows: Tensor, *, before: bool = False) -> Tensor:
        return rows * (self.exclusive if before else self.cumulative).to(self.dtype).exp()[..., None]

    def to_end(self, cols: Tensor) -> Tensor:
        return cols * (self.cumulative[..., -1:] - self.cumulative).to(self.dtype).exp()[..., None]

    def total(self) -> Tensor | None:
        return self.cumulative[..., -1].to(self.dtype).exp()[..., None, None]  # [B, H, N, 1, 1]


class ChannelDecay(NoDecay):
    """A log gate per token, head and channel, ``g [B, H, N, C, K]``, <= 0; C a power of two.

    ``prefix`` and ``suffix`` of a level with blocks of b tokens: the sums from the block's begin up to and
    with token i, and from behind token j to the block's end. A level of 2b follows from b by additions.
    """

    def __init__(self, g: Tensor) -> None:
        prefix, exclusive, suffix = g, torch.zeros_like(g), torch.zeros_like(g)
        self.levels: list[tuple[Tensor, Tensor, Tensor]] = []
        block, chunk = 1, g.shape[-2]
        while block < chunk:
            prefix, exclusive, suffix = (x.unflatten(-2, (-1, 2, block)) for x in (prefix, exclusive, suffix))
            first_sum, second_sum = prefix[..., 0, -1:, :], prefix[..., 1, -1:, :]  # [..., C/2b, 1, K]
            # rows stand in the second half, columns in the first: both sums end at the boundary between them
            self.levels.append(
                (prefix[..., 1, :, :].exp(), exclusive[..., 1, :, :].exp(), suffix[..., 0, :, :].exp())
            )  # [..., C/2b, b, K]
            prefix, exclusive = (
                torch.stack([x[..., 0, :, :], x[..., 1, :, :] + first_sum], -3).flatten(-4, -2)
                for x in (prefix, exclusive)
            )
            suffix = torch.stack([suffix[..., 0, :, :] + second_sum, suffix[..., 1, :, :]], -3).flatten(
                -4, -2
            )
            block *= 2
        self.prefix, self.exclusive, self.suffix = prefix.exp(), exclusive.exp(), suffix.exp()

    def scores(self, rows: Tensor, cols: Tensor, *, before: bool = False, diagonal: bool = True) -> Tensor:
        if diagonal and not before:
            scores = (rows * cols).sum(-1)[..., None, None]  # [..., C, 1, 1]: blocks of one token
        else:
            scores = rows.new_zeros((*rows.shape[:-1], 1, 1))
        for prefix, exclusive, suffix in self.levels:
            block = prefix.shape[-2]
            later = rows.unflatten(-2, (-1, 2, block))[..., 1, :, :] * (exclusive if before else prefix)
            earlier = cols.unflatten(-2, (-1, 2, block))[..., 0, :, :] * suffix
            across = later @ earlier.transpose(-1, -2)  # [..., C/2b, b, b]
            pair = scores.unflatten(-3, (-1, 2))  # [..., C/2b, 2, b, b]
            top = F.pad(pair[..., 0, :, :], (0, block))  # [..., C/2b, b, 2b]
            bottom = torch.cat([across, pair[..., 1, :, :]], dim=-1)
            scores = torch.cat([top, bottom], dim=-2)  # [..., C/2b, 2b, 2b]
        return scores.squeeze(-3)

    def from_start(self, rows: Tensor, *, before: bool = False) -> Tensor:
        return rows * (self.exclusive if before else self.prefix)

    def to_end(self, cols: Tensor) -> Tensor:
        return cols * self.suffix

    def total(self) -> Tensor | None:
        return self.prefix[..., -1, :, None]  # [B, H, N, K, 1]


def decay(g: Tensor | None) -> NoDecay:
    """The decays of chunks for log gates None, ``[B, H, N, C]`` or ``[B, H, N, C, K]``."""
    if g is None:
        return NoDecay()
    return ScalarDecay(g) if g.dim() == 4 else ChannelDecay(g)
