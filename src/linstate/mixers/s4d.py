"""S4D: a diagonal state space for each channel, time-invariant.

    S' = A S + B u      o = 2 Re(C . S) + D u      A = diag(lambda), Re lambda = -exp(log_decay) < 0
    Abar = exp(dt lambda)      Bbar = (exp(dt lambda) - 1) / lambda * B      (zero-order hold)
    S_t = Abar * S_{t-1} + Bbar u_t      K_j = 2 Re(sum_n C_n Abar_n^j Bbar_n)
    y = glu(W_o gelu(o))

The paper's letters: its state x is our S, its Delta is dt. ``state_size`` counts real numbers, as the paper's N; half
as many complex ones are kept, one of each conjugate pair. ``init``: "lin" ``lambda_n = -1/2 + i pi n``, "inv"
``-1/2 + i N/pi (N / (2n + 1) - 1)``, "legs" the eigenvalues of S4's normal part.

Source: Gu, Gupta, Goel, Re 2022, On the Parameterization and Initialization of Diagonal State Space Models,
arXiv 2206.11893, sections 3 and 4.
"""

from __future__ import annotations

import math

import torch

from linstate.errors import ConfigError
from linstate.mixers._state_space import StateSpaceMixer, System, hippo_legs


class S4D(StateSpaceMixer):
    """See the module. State: ``S [B, D, N, 2]``: N complex numbers, one of each conjugate pair, as pairs of reals."""

    equation = "S_t = exp(dt A) * S_{t-1} + B u, complex, time-invariant"
    source = "Gu 2022, arXiv 2206.11893"

    def __init__(
        self,
        d_model: int,
        state_size: int = 64,
        init: str = "lin",
        dt_range: tuple[float, float] = (1e-3, 0.1),
        convolution: bool = True,
    ) -> None:
        place = torch.arange(state_size // 2, dtype=torch.float64)
        frequencies = {
            "lin": math.pi * place,
            "inv": state_size / math.pi * (state_size / (2 * place + 1) - 1),
            "legs": hippo_legs(state_size)[0].imag,
        }
        if init not in frequencies:
            raise ConfigError(f"s4d: init must be one of {', '.join(frequencies)}, got {init!r}")
        values = torch.complex(torch.full_like(place, -0.5), frequencies[init])
        super().__init__(d_model, state_size, values, torch.ones_like(values), dt_range, convolution)

    def discretise(self) -> System:
        dt, values, B, C = self.continuous(torch.float64)
        A = (dt * values).exp()
        return System(*(torch.view_as_real(x) for x in (A, (A - 1) / values * B, C)))
