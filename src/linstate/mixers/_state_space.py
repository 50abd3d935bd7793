"""What S4 and S4D share: a complex state of their own for each channel, the same at every token, and what is around it.

    S' = A S + B u,  o = 2 Re(C . S) + D u      for each channel u of x, discretised with a step dt of its own
    y = glu(W_o gelu(o))

A text is read as one convolution with the kernel ``K_j = 2 Re(C Abar^j Bbar)`` in training (with ``convolution``), and
else as the recurrence in chunks, which carries a state; both are the same function. In chunks less is kept and, on a
CPU, training is faster: S4 by a factor of two at 1,000 tokens. They differ in A and in how it is discretised.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linstate.mixers.base import Mixer, divide
from linstate.ops import state_space
from linstate.ops.state_space.convolution import convolve, final_state, impulse_response
from linstate.types import LayerState, state_dtype


class System(NamedTuple):
    """A discretised state space: arguments of :func:`linstate.ops.state_space`, ``[D, N, 2]`` each."""

    A: Tensor
    B: Tensor
    C: Tensor
    a: Tensor | None = None
    b: Tensor | None = None

    def to(self, dtype: torch.dtype) -> System:
        return System(*(None if x is None else x.to(dtype) for x in self))  # type: ignore[arg-type]


def pairs(x: Tensor) -> Tensor:
    """Complex numbers as pairs of reals, float32, for a parameter."""
    return torch.view_as_real(x.to(torch.complex64)).clone()


class StateSpaceMixer(Mixer):
    """See the module. State: ``S [B, D, N, 2]``: N complex numbers, one of each conjugate pair, as pairs of reals."""

    recurrence = "state_space"

    def __init__(
        self,
        d_model: int,
        state_size: int,
        eigenvalues: Tensor,
        B: Tensor,
        dt_range: tuple[float, float],
        convolution: bool,
    ) -> None:
        """``eigenvalues`` and ``B``: complex ``[N]``, at first the same for every channel."""
        super().__init__(d_model)
        self.pairs = divide(state_size, 2, "state_size into conjugate pairs")
        self.convolution = convolution
        low, high = dt_range
        self.log_dt = nn.Parameter(torch.empty(d_model).uniform_(math.log(low), math.log(high)))
        self.log_decay = nn.Parameter((-eigenvalues.real).log().float().repeat(d_model, 1))  # [D, N]
        self.frequency = nn.Parameter(eigenvalues.imag.float().repeat(d_model, 1))  # [D, N]
        self.B = nn.Parameter(pairs(B).repeat(d_model, 1, 1))  # [D, N, 2]
        self.C = nn.Parameter(torch.randn(d_model, self.pairs, 2) * 0.5**0.5)
        self.D = nn.Parameter(torch.randn(d_model))
        self.out_proj = nn.Linear(d_model, 2 * d_model, bias=False)

    def continuous(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dt ``[D, 1]`` real; eigenvalues, B and 2 C ``[D, N]`` complex, with parts of ``dtype``."""
        values = torch.complex(-self.log_decay.to(dtype).exp(), self.frequency.to(dtype))
        B, C = (torch.view_as_complex(x.to(dtype)) for x in (self.B, 2 * self.C))
        return self.log_dt.to(dtype).exp()[:, None], values, B, C

    @abstractmethod
    def discretise(self) -> System:
        """The system in float64: the steps are small, and a decay is what is left of 1."""

    def kernel(self, system: System, length: int) -> Tensor:
        """``[D, length]``; a subclass may know a closed form."""
        return impulse_response(*system, length=length)

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        shared: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, LayerState]:
        system = self.discretise().to(state_dtype(x))
        alone = state is None and cu_seqlens is None and x.shape[1] > 0
        if self.training and self.convolution and alone:
            o = convolve(x, self.kernel(system, x.shape[1]))
            after = final_state(x, system.A, system.B, system.a, system.b)
        else:
            before = state["S"] if state else None
            o, after = state_space(x, *system, initial_state=before, cu_seqlens=cu_seqlens)
        o = o + x * self.D
        return F.glu(self.out_proj(F.gelu(o)), dim=-1), {"S": after}

    def init_state(self, batch: int, *, device: torch.device | str | None = None) -> LayerState:
        return {"S": self.zeros(batch, self.d_model, self.pairs, 2, device=device)}

    def recurrence_flops(self, tokens: int) -> int:
        return tokens * self.d_model * self.pairs * 14


def hippo_legs(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """HiPPO-LegS in its normal plus low rank form (S4's appendix C.1): eigenvalues, P and B, complex ``[size / 2]``.

    ``A = V (diag(values) - P P^*) V^*``, of each conjugate pair the one with a positive frequency, in rising order.
    """
    root = torch.arange(size, dtype=torch.float64).mul(2).add(1).sqrt()  # sqrt(2 n + 1)
    A = -(root[:, None] * root).tril(-1) - torch.diag(torch.arange(1.0, size + 1, dtype=torch.float64))
    P = (root / 2**0.5).to(torch.complex128)
    skew = A + (root[:, None] * root) / 2 + torch.eye(size) / 2
    frequency, V = torch.linalg.eigh(-1j * skew)
    half = slice(size // 2, None)
    values = torch.complex(torch.full_like(frequency, -0.5), frequency)
    to_basis = V[:, half].conj().t()
    return values[half], to_basis @ P, to_basis @ root.to(torch.complex128)
