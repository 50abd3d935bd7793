"""The time-invariant state space in chunks: inside a chunk a convolution, from chunk to chunk the state.

With the transition P, a chunk of c tokens answers ``y_i = sum_{j <= i} (C P^(i-j) B) u_j + C P^(i+1) S`` and leaves
``P^c S + sum_j P^(c-1-j) B u_j``: matrices that are the same for every chunk, made by doubling from the squares of P.
N complex numbers are 2N reals here. A diagonal P stays N complex factors; with a low rank it is a dense real matrix.
Memory: D x c x (c + 2N), with a low rank also D x 2N x 2N, whatever T is.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from linstate.ops.dispatch import register
from linstate.ops.state_space.definition import as_complex
from linstate.types import state_dtype

CHUNK = 64


def transition(A: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
    """P: ``[D, N]`` complex where it is diagonal, else ``[D, 2N, 2N]`` real."""
    if a is None or b is None:
        return as_complex(A, A.dtype)
    dense = a.flatten(1)[:, :, None] * as_row(b)[:, None]  # [D, 2N, 2N]
    real, imaginary = A.unbind(-1)  # [D, N] each
    blocks = torch.stack([real, -imaginary, imaginary, real], dim=1)  # [D, 4, N]
    for block, (row, column) in zip(blocks.unbind(1), ((0, 0), (0, 1), (1, 0), (1, 1)), strict=True):
        dense[:, row::2, column::2].diagonal(dim1=-2, dim2=-1).add_(block)
    return dense


def as_row(x: Tensor) -> Tensor:
    """``[D, N, 2] -> [D, 2N]``: the row r with ``r . s = Re(sum_n x_n s_n)`` for a state s of pairs of reals."""
    return torch.stack([x[..., 0], -x[..., 1]], dim=-1).flatten(-2)


def move(P: Tensor, x: Tensor, *, transposed: bool = False) -> Tensor:
    """``P x``, or ``P^T x``, for vectors ``x [D, M, 2N]``."""
    if P.is_complex():
        turned = as_complex(x.unflatten(-1, (-1, 2)), x.dtype) * (P.conj() if transposed else P)[:, None]
        return torch.view_as_real(turned).flatten(-2)
    return x @ (P if transposed else P.transpose(-1, -2))


def squares(P: Tensor, count: int) -> list[Tensor]:
    """``P, P^2, P^4, ...``, so many."""
    found = [P]
    while len(found) < count:
        found.append(found[-1] * found[-1] if P.is_complex() else found[-1] @ found[-1])
    return found


def leap(powers: list[Tensor], x: Tensor, exponent: int, *, transposed: bool = False) -> Tensor:
    """``P^exponent x`` for vectors ``x [D, M, 2N]``; ``powers``: the squares of P, as many as the exponent has bits."""
    for bit in range(exponent.bit_length()):
        if exponent >> bit & 1:
            x = move(powers[bit], x, transposed=transposed)
    return x


def orbit(powers: list[Tensor], x: Tensor, length: int, *, transposed: bool = False) -> Tensor:
    """``x, P x, P^2 x, ...``: ``x [D, 2N] -> [D, length, 2N]``."""
    found = x[:, None]
    for P in powers:
        if found.shape[1] < length:
            found = torch.cat([found, move(P, found, transposed=transposed)], dim=1)
    return found[:, :length]


def walk(
    u: Tensor, powers: list[Tensor], written: Tensor, state: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The chunks of ``u [D, B, T]``, with the state ``[D, B, 2N]`` before and after each; ``written``: P^j B."""
    for piece in u.split(CHUNK, dim=-1):
        tokens = piece.shape[-1]
        after = leap(powers, state, tokens) + piece @ written[:, :tokens].flip(1)
        yield piece, state, after
        state = after


@register("state_space", "chunked", "torch")
def chunked(
    u: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See the module; arguments as in :func:`linstate.ops.state_space`."""
    dtype = state_dtype(u)
    if initial_state is None:
        initial_state = u.new_zeros((u.shape[0], *A.shape), dtype=dtype)
    if u.shape[1] == 0:
        return torch.zeros_like(u), initial_state.clone()
    A, B, C = (x.to(dtype) for x in (A, B, C))
    P = transition(A, *(None if x is None else x.to(dtype) for x in (a, b)))
    length = min(CHUNK, u.shape[1])
    powers = squares(P, length.bit_length())
    written = orbit(powers, B.flatten(1), length)  # P^j B: [D, c, 2N]
    read = orbit(powers, as_row(C), length, transposed=True)  # C P^j: [D, c, 2N]
    kernel = (written @ as_row(C)[..., None]).squeeze(-1)  # C P^j B: [D, c]
    place = torch.arange(length, device=u.device)
    within = kernel[:, (place[:, None] - place).clamp(min=0)].tril()  # [D, c, c]
    ahead = move(P, read, transposed=True).transpose(-1, -2)  # C P^(j + 1): [D, 2N, c]
    state = initial_state.flatten(2).transpose(0, 1)  # [D, B, 2N]
    outputs = []
    for piece, before, after in walk(u.to(dtype).permute(2, 0, 1), powers, written, state):
        tokens = piece.shape[-1]
        answer = piece @ within[:, :tokens, :tokens].transpose(-1, -2)
        outputs.append(answer + before @ ahead[..., :tokens])  # [D, B, c]
        state = after
    y = torch.cat(outputs, dim=-1).permute(1, 2, 0).contiguous()  # [B, T, D]
    return y.to(u.dtype), state.transpose(0, 1).unflatten(-1, (-1, 2)).contiguous()
