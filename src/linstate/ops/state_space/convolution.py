"""The time-invariant state space as one convolution over a whole text, by FFT: the form to train in.

It needs the kernel ``K_j = C P^j B`` for every j < T, which may have a closed form, and starts from an empty state.
The rounding errors of an FFT reach every token, so that it is causal up to rounding only; the forms of
:func:`linstate.ops.state_space` are causal to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linstate.ops.state_space.torch_chunked import CHUNK, as_row, leap, orbit, squares, transition, walk
from linstate.types import state_dtype


def convolve(u: Tensor, kernel: Tensor) -> Tensor:
    """``y_t = sum_{j <= t} K_{t-j} u_j``: ``u [B, T, D]``, ``kernel [D, T]`` -> y ``[B, T, D]`` in u's dtype."""
    dtype, tokens = state_dtype(u), u.shape[1]
    size = max(1, 2 * tokens)  # as long as the product of two polynomials: nothing comes round
    spectrum = torch.fft.rfft(u.to(dtype), size, dim=1) * torch.fft.rfft(kernel.to(dtype), size, dim=1).t()
    return torch.fft.irfft(spectrum, size, dim=1)[:, :tokens].to(u.dtype)


def impulse_response(
    A: Tensor, B: Tensor, C: Tensor, a: Tensor | None = None, b: Tensor | None = None, *, length: int
) -> Tensor:
    """The kernel ``K_j = C P^j B`` from the powers of P, ``[D, length]``; arguments as in ``state_space``."""
    written = orbit(squares(transition(A, a, b), length.bit_length()), B.flatten(1), length)
    return (written @ as_row(C)[..., None]).squeeze(-1)


def truncated(A: Tensor, C: Tensor, a: Tensor | None, b: Tensor | None, *, length: int) -> Tensor:
    """``C (1 - P^length)``, ``[D, N, 2]``: with it for C, the endless generating function is that of ``length`` terms."""
    row = as_row(C)
    late = leap(
        squares(transition(A, a, b), length.bit_length()), row[:, None], length, transposed=True
    ).squeeze(1)
    pairs = (row - late).unflatten(-1, (-1, 2))
    return torch.stack([pairs[..., 0], -pairs[..., 1]], dim=-1)


def final_state(u: Tensor, A: Tensor, B: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    """The state ``[B, D, N, 2]`` after ``u [B, T, D]`` from an empty one, without the outputs."""
    length = min(CHUNK, max(1, u.shape[1]))
    powers = squares(transition(A, a, b), length.bit_length())
    state = B.new_zeros((u.shape[2], u.shape[0], 2 * A.shape[1]))
    written = orbit(powers, B.flatten(1), length)
    for _, _, after in walk(u.to(B.dtype).permute(2, 0, 1), powers, written, state):
        state = after
    return state.transpose(0, 1).unflatten(-1, (-1, 2)).contiguous()
