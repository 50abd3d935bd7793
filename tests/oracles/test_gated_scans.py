"""``hgrn``, ``mingru`` and ``minlstm``: FLA's naive HGRN recurrence, and the papers' formulas token by token.

What is around the recurrence is written here from the papers, with the weights of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linstate.errors import ArgumentError
from linstate.mixers.base import Mixer, Place
from linstate.mixers.hgrn import HGRN
from linstate.mixers.mingru import MinGRU
from linstate.mixers.minlstm import MinLSTM
from oracles.oracle import CUT, agree, fla_naive, hold, pieces, randomise

pytestmark = pytest.mark.oracle

D = 40
State = Mapping[str, Tensor] | None
Read = Callable[[Tensor, State], tuple[Tensor, Mapping[str, Tensor]]]


def expected_of(read: Read, inputs: list[Tensor]) -> list[tuple[Tensor, Mapping[str, Tensor]]]:
    found: list[tuple[Tensor, Mapping[str, Tensor]]] = []
    state: State = None
    for x in inputs:
        y, state = read(x, state)
        found.append((y, state))
    return found


@pytest.mark.parametrize("layer", [0, 2])
@torch.no_grad()
def test_hgrn(layer: int) -> None:
    torch.manual_seed(0)
    naive = fla_naive("hgrn/naive").naive_recurrent_hgrn
    places = [Place(i, 4, first=i == 0) for i in range(4)]
    holder, ours = HGRN(D, place=places[0]), HGRN(D, place=places[layer])
    randomise(holder)
    randomise(ours)
    Gamma = holder.floor.gamma
    assert Gamma is not None
    shares = Gamma.softmax(0)
    gamma = shares[1 : layer + 1].sum(0)

    def theirs(x: Tensor, state: State) -> tuple[Tensor, Mapping[str, Tensor]]:
        c, f, z = (x @ w.t() for w in ours.in_proj.weight.split(D))
        forget = gamma + (1 - gamma) * torch.sigmoid(f)
        before = None if state is None else state["S"][:, 0, 0]
        o, after = naive((1 - forget) * F.silu(c), forget.log(), before, output_final_state=True)
        normed = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * ours.norm.weight
        return (normed * F.silu(z)) @ ours.out_proj.weight.t(), {"S": after[:, None, None]}

    def read(x: Tensor, state: State) -> tuple[Tensor, Mapping[str, Tensor]]:
        shared: dict[str, Tensor] = {}
        holder(x, shared=shared)
        return ours(x, None if state is None else dict(state), shared=shared)

    inputs = pieces(D)
    hold(read, expected_of(theirs, inputs), inputs)
    if layer:
        with pytest.raises(ArgumentError, match="shared must hold 'hgrn_floor'"):
            ours(inputs[0])


def positive(x: Tensor) -> Tensor:
    """g of the paper's appendix B."""
    return torch.where(x >= 0, x + 0.5, torch.sigmoid(x))


def mingru_step(x: Tensor, h: Tensor, mixer: Mixer) -> Tensor:
    W_z, W_h = mixer.get_parameter("in_proj.weight").chunk(2)
    z = torch.sigmoid(x @ W_z.t())
    return (1 - z) * h + z * positive(x @ W_h.t())


def minlstm_step(x: Tensor, h: Tensor, mixer: Mixer) -> Tensor:
    W_f, W_i, W_h = mixer.get_parameter("in_proj.weight").chunk(3)
    f, i = torch.sigmoid(x @ W_f.t()), torch.sigmoid(x @ W_i.t())
    return f / (f + i) * h + i / (f + i) * positive(x @ W_h.t())


KINDS = [(MinGRU, mingru_step), (MinLSTM, minlstm_step)]


@pytest.mark.parametrize(("kind", "step"), KINDS, ids=["mingru", "minlstm"])
@torch.no_grad()
def test_token_by_token(kind: type[Mixer], step: Callable[[Tensor, Tensor, Mixer], Tensor]) -> None:
    torch.manual_seed(0)
    ours = kind(D)
    randomise(ours)

    def theirs(x: Tensor, state: State) -> tuple[Tensor, Mapping[str, Tensor]]:
        h = torch.zeros(x.shape[0], 2 * D) if state is None else state["S"][:, 0, 0]
        outputs = []
        for t in range(x.shape[1]):
            h = step(x[:, t], h, ours)
            outputs.append(h @ ours.get_parameter("out_proj.weight").t())
        return torch.stack(outputs, dim=1), {"S": h[:, None, None]}

    inputs = pieces(D)
    hold(ours, expected_of(theirs, inputs), inputs)


def scan_of_logarithms(log_a: Tensor, log_b: Tensor, log_h0: Tensor) -> Tensor:
    """The paper's parallel scan: ``h_t = exp(A_t + logsumexp(log h_0, log b_i - A_i))`` with ``A = cumsum(log a)``."""
    A = torch.cat([torch.zeros_like(log_h0), log_a.cumsum(1)], dim=1)
    return (A + torch.logcumsumexp(torch.cat([log_h0, log_b], dim=1) - A, dim=1)).exp()[:, 1:]


@pytest.mark.parametrize("kind", [MinGRU, MinLSTM], ids=["mingru", "minlstm"])
@torch.no_grad()
def test_scan_of_logarithms(kind: type[Mixer]) -> None:
    torch.manual_seed(0)
    ours = kind(D).double()
    randomise(ours)
    x = torch.cat(pieces(D), dim=1).double()
    _, state = ours(x[:, :CUT])
    projected = (x[:, CUT:] @ ours.get_parameter("in_proj.weight").t()).chunk(2 if kind is MinGRU else 3, -1)
    if kind is MinGRU:
        z, c = projected
        log_a, log_i = -F.softplus(z), -F.softplus(-z)
    else:
        f, i, c = projected
        difference = F.softplus(-f) - F.softplus(-i)
        log_a, log_i = -F.softplus(difference), -F.softplus(-difference)
    h = scan_of_logarithms(log_a, log_i + positive(c).log(), state["S"][:, 0].log())
    y, after = ours(x[:, CUT:], state)
    agree("output", y, h @ ours.get_parameter("out_proj.weight").t())
    agree("S", after["S"][:, 0, 0], h[:, -1])
