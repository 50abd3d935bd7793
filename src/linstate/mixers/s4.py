"""S4: a state space for each channel, diagonal plus low rank, that begins as HiPPO-LegS; time-invariant.

    S' = A S + B u      o = 2 Re(C . S) + D u      A = diag(lambda) - P P^*, Re lambda = -exp(log_decay) < 0
    Abar = (1 - dt/2 A)^-1 (1 + dt/2 A)      Bbar = (1 - dt/2 A)^-1 dt B      (bilinear)
    S_t = Abar S_{t-1} + Bbar u_t      K_j = 2 Re(C Abar^j Bbar)
    y = glu(W_o gelu(o))

The paper's letters: its state x is our S, its Delta is dt, its Lambda is diag(lambda); Q = P, which keeps A stable (Goel
2022, 2202.09729). C is the output's own, and the paper's C~ = C (1 - Abar^L) is made from it. ``state_size`` counts
real numbers, as the paper's N; half as many complex ones are kept, one of each conjugate pair.

As a recurrence: by Woodbury Abar is diagonal plus rank one again, with ``M = (1 - dt/2 lambda)^-1``:

    Abar S = (2 M - 1) S + a Re(b . S)      a = -dt / (1 + dt Re(sum M |P|^2)) M P      b = 2 M conj(P)

As a convolution: the generating function of K at the roots of unity z is a Cauchy kernel, with one division for the rank,
and an inverse FFT gives K (appendix C.3). Multiplied by (1 + z) / 2, nothing is infinite at z = -1.

Source: Gu, Goel, Re 2021, Efficiently Modeling Long Sequences with Structured State Spaces, arXiv 2111.00396, sections 2
and 3, appendix C.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from linstate.mixers._state_space import StateSpaceMixer, System, hippo_legs, pairs
from linstate.ops.state_space.convolution import truncated


class S4(StateSpaceMixer):
    """See the module. State: ``S [B, D, N, 2]``: N complex numbers, one of each conjugate pair, as pairs of reals."""

    equation = "S_t = (diag(A) + a b^T) S_{t-1} + B u, HiPPO-LegS, complex, time-invariant"
    source = "Gu 2021, arXiv 2111.00396"

    def __init__(
        self,
        d_model: int,
        state_size: int = 64,
        dt_range: tuple[float, float] = (1e-3, 0.1),
        convolution: bool = True,
    ) -> None:
        values, P, B = hippo_legs(state_size)
        super().__init__(d_model, state_size, values, B, dt_range, convolution)
        self.P = nn.Parameter(pairs(P).repeat(d_model, 1, 1))  # [D, N, 2]

    def discretise(self) -> System:
        dt, values, B, C = self.continuous(torch.float64)
        P = torch.view_as_complex(self.P.double())
        M = 1 / (1 - dt / 2 * values)
        rank = 1 + dt * (M * P.abs().square()).sum(-1, keepdim=True).real
        a, b = -dt / rank * M * P, 2 * M * P.conj()
        written = dt * M * B + a * (b * B).sum(-1, keepdim=True).real * dt / 2
        return System(*(torch.view_as_real(x) for x in (2 * M - 1, written, C, a, b)))

    def kernel(self, system: System, length: int) -> Tensor:
        """By the generating function; memory D x length x N."""
        dtype = system.A.dtype
        dt, values, B, _ = self.continuous(dtype)
        P = torch.view_as_complex(self.P.to(dtype))
        C = torch.view_as_complex(truncated(system.A, system.C, system.a, system.b, length=length)) / 2
        angle = torch.arange(length // 2 + 1, device=dt.device, dtype=torch.float64) * (-2 * math.pi / length)
        z = torch.polar(torch.ones_like(angle), angle).to(values.dtype)  # [F]

        def both(x: Tensor) -> Tensor:
            return torch.cat([x, x.conj()], dim=-1)  # the conjugate pairs, [D, 2N]

        cauchy = 2 / ((2 / dt * (1 - z))[..., None] - (1 + z)[:, None] * both(values)[:, None])  # [D, F, 2N]
        rows, columns = torch.stack([both(C), both(P.conj())], -2), torch.stack([both(B), both(P)], -2)
        products = rows[:, :, None] * columns[:, None]  # [D, 2, 2, 2N]
        sums = torch.einsum("dfn,dijn->ijdf", cauchy, products)
        half = (1 + z) / 2
        return torch.fft.irfft(
            sums[0, 0] - sums[0, 1] * half / (1 + half * sums[1, 1]) * sums[1, 0], length, dim=-1
        )
