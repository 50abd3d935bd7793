"""``s4`` and ``s4d`` are dense state spaces, discretised by matrix inverse and exponential, kernels by powers of Abar.

S4's is HiPPO-LegS itself, a real lower triangular matrix; only the basis is changed to ours to compare states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linstate.errors import ConfigError
from linstate.mixers._state_space import StateSpaceMixer, hippo_legs
from linstate.mixers.s4 import S4
from linstate.mixers.s4d import S4D
from linstate.ops.state_space.convolution import impulse_response
from oracles.oracle import CUT, TOKENS, agree, deviation, hold, pieces

pytestmark = pytest.mark.oracle

D, N = 6, 32
Dense = tuple[Tensor, Tensor, Tensor, Callable[[Tensor], Tensor]]
"""Abar ``[D, N, N]``, Bbar and C ``[D, N]``, and what makes our state of the dense one ``[B, D, N]``."""


def legs() -> tuple[Tensor, Tensor]:
    """HiPPO-LegS by its definition, entry by entry: A ``[N, N]`` and B ``[N]``."""
    A = torch.zeros(N, N, dtype=torch.float64)
    for n in range(N):
        for k in range(n + 1):
            A[n, k] = -(n + 1) if n == k else -(((2 * n + 1) * (2 * k + 1)) ** 0.5)
    return A, (2 * torch.arange(N, dtype=torch.float64) + 1).sqrt()


def basis(mixer: S4) -> Tensor:
    """V^* ``[N / 2, N]``: eigenvectors of A + P P^T by a general solver, turned as the mixer's are."""
    A, _ = legs()
    P = (torch.arange(N, dtype=torch.float64) + 0.5).sqrt()
    values, vectors = torch.linalg.eig(A + P[:, None] * P)
    order = values.imag.argsort()[N // 2 :]
    V = vectors[:, order].conj().t()
    ours = torch.view_as_complex(mixer.P[0].double())
    return V * (ours / (V @ P.to(V.dtype)))[:, None]


def dense_s4(mixer: S4) -> Dense:
    A, B = legs()
    V = basis(mixer)
    agree("eigenvectors are of length one", (V @ V.conj().t()).real, torch.eye(N // 2, dtype=torch.float64))
    assert (torch.view_as_complex(mixer.B[0].double()) - V @ B.to(V.dtype)).abs().max() < 1e-4
    dt = mixer.log_dt.double().exp()[:, None, None]
    one = torch.eye(N, dtype=torch.float64)
    inverse = torch.linalg.inv(one - dt / 2 * A)
    C = 2 * (torch.view_as_complex(mixer.C.double()) @ V).real
    return (
        inverse @ (one + dt / 2 * A),
        (inverse @ B) * dt[:, 0],
        C,
        lambda state: torch.view_as_real(state.to(V.dtype) @ V.t()),
    )


def dense_s4d(mixer: S4D) -> Dense:
    values = torch.complex(-mixer.log_decay.double().exp(), mixer.frequency.double())
    A = torch.diag_embed(torch.cat([values, values.conj()], -1))  # [D, N, N]
    B, C = (torch.view_as_complex(x.double()) for x in (mixer.B, mixer.C))
    B, C = torch.cat([B, B.conj()], -1), torch.cat([C, C.conj()], -1)
    dt = mixer.log_dt.double().exp()[:, None, None]
    held = torch.linalg.matrix_exp(dt * A)
    one = torch.eye(N, dtype=A.dtype)
    written = torch.linalg.solve(A, ((held - one) @ B[..., None])).squeeze(-1)
    return held, written, C, lambda state: torch.view_as_real(state[..., : N // 2].contiguous())


def read_dense(mixer: StateSpaceMixer, dense: Dense, x: Tensor) -> list[tuple[Tensor, Mapping[str, Tensor]]]:
    """Outputs and states after CUT, TOKENS and all tokens: the kernel by powers of Abar, the state by the recurrence."""
    A, B, C, ours = dense
    dtype, x = x.dtype, x.double()
    kernel, power = [], B
    for _ in range(x.shape[1]):
        kernel.append((C * power).sum(-1).real)
        power = (A @ power[..., None]).squeeze(-1)
    K = torch.stack(kernel)  # [T, D]
    o = torch.stack([(K[: t + 1].flip(0) * x[:, : t + 1]).sum(1) for t in range(x.shape[1])], dim=1)
    state, states = torch.zeros(x.shape[0], *B.shape, dtype=A.dtype), []
    for t in range(x.shape[1]):
        state = (A @ state[..., None]).squeeze(-1) + B * x[:, t, :, None]
        states.append(state)
    o = F.gelu(o + mixer.D.double() * x) @ mixer.out_proj.weight.double().t()
    value, gate = o.chunk(2, dim=-1)
    y = (value * torch.sigmoid(gate)).to(dtype)
    ends = (CUT, TOKENS, x.shape[1])
    return [
        (y[:, start:end], {"S": ours(states[end - 1]).to(dtype)})
        for start, end in zip((0, *ends), ends, strict=False)
    ]


MIXERS: dict[str, tuple[Callable[[], StateSpaceMixer], Callable[..., Dense]]] = {
    "s4": (lambda: S4(D, N), dense_s4),
    **{f"s4d {init}": (lambda init=init: S4D(D, N, init), dense_s4d) for init in ("lin", "inv", "legs")},  # type: ignore[misc]
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_dense(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    make, dense = MIXERS[name]
    ours = make().to(dtype).eval()
    ours.log_dt.copy_(torch.linspace(-5.5, -2, D))
    ours.out_proj.weight.normal_()
    if name == "s4":  # its float32 weights are HiPPO rounded; in float64 it is HiPPO
        values, P, B = hippo_legs(N)
        ours.log_decay.fill_(math.log(0.5))
        for weight, exact in ((ours.frequency, values.imag), (ours.P, P), (ours.B, B)):
            weight.copy_(torch.view_as_real(exact) if exact.is_complex() else exact)
    inputs = [x.to(dtype) for x in pieces(D)]
    expected = read_dense(ours, dense(ours), torch.cat(inputs, dim=1))
    hold(ours, expected, inputs)
    whole, after = ours.train()(torch.cat(inputs, dim=1))
    agree("output of the convolution", whole, torch.cat([y for y, _ in expected], dim=1))
    agree("state after the convolution", after["S"], expected[-1][1]["S"])
    if dtype == torch.float64:
        read, after = ours.eval()(torch.cat(inputs, dim=1))
        for found in (whole, read):
            assert deviation(found, torch.cat([y for y, _ in expected], dim=1)) < 1e-9
        assert deviation(after["S"], expected[-1][1]["S"]) < 1e-9


@pytest.mark.parametrize("tokens", [1, 2, 7, 64, 65, 150])
@pytest.mark.parametrize("name", MIXERS)
def test_training_as_a_convolution_is_reading_as_a_recurrence(name: str, tokens: int) -> None:
    """In float64: outputs, states and the gradients of every weight."""
    torch.manual_seed(0)
    mixer = MIXERS[name][0]().double()
    with torch.no_grad():
        mixer.log_decay.add_(0.3 * torch.randn_like(mixer.log_decay))
        mixer.out_proj.weight.normal_()
    x = torch.randn(2, tokens, D, dtype=torch.float64, requires_grad=True)
    found = []
    for mode in (True, False):
        y, after = mixer.train(mode)(x)
        loss = (y * torch.linspace(1, 2, tokens, dtype=torch.float64)[:, None]).sum() + after["S"].sin().sum()
        found.append((y, after["S"], *torch.autograd.grad(loss, [x, *mixer.parameters()])))
    for what, ours, theirs in zip(
        ["output", "state", "gradient of x", *dict(mixer.named_parameters())], *found, strict=True
    ):
        off = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        assert off <= 1e-9, f"{what}: off by {off:.1e}"
    assert not torch.equal(found[0][0], found[1][0]) or tokens < 7, "both are the same form"
    mixer.convolution = False
    assert torch.equal(mixer.train()(x)[0], found[1][0])


@pytest.mark.parametrize("tokens", [1, 2, 33, 128])
@torch.no_grad()
def test_the_cauchy_kernel_is_the_powers(tokens: int) -> None:
    torch.manual_seed(0)
    mixer = S4(D, N).double()
    mixer.log_decay.add_(0.5 * torch.randn_like(mixer.log_decay))
    system = mixer.discretise()
    found, expected = mixer.kernel(system, tokens), impulse_response(*system, length=tokens)
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()


def test_the_normal_part_of_hippo() -> None:
    """``V (diag - P P^*) V^*`` is HiPPO-LegS: its characteristic polynomial has the roots -1, ..., -N."""
    values, P, _ = hippo_legs(12)
    both, P = torch.cat([values, values.conj()]), torch.cat([P, P.conj()])
    roots = torch.linalg.eigvals(torch.diag(both) - P[:, None] * P.conj())
    assert (roots.real.sort(descending=True).values + torch.arange(1, 13)).abs().max() < 1e-4
    assert roots.imag.abs().max() < 1e-4 and (values.imag > 0).all()


def test_options() -> None:
    with pytest.raises(ConfigError, match="init must be one of lin, inv, legs, got 'random'"):
        S4D(8, init="random")
    with pytest.raises(ConfigError, match="state_size into conjugate pairs"):
        S4(8, state_size=7)
