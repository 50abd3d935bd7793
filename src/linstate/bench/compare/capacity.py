"""How many pairs of a key and a value a bare recurrence holds: keys are ideal, nothing is trained.

n pairs are written, one a token, into one head; then each key is asked. Values are different ones of C random unit
vectors (a codebook), and an answer is right when the nearest of them is the one that was written. Recall is exact while
the answer itself, a vector, is off by less than :data:`EXACT`.

Theory, with keys of K channels and values of V. Orthogonal keys do not disturb each other, and there are K of them. With
random unit keys a sum of outer products answers v_j + sum_i (k_i . k_j) v_i: against another codeword the noise has variance
n / (K V), the largest of C such is about sqrt(2 ln C n / (K V)), and it reaches the signal, 1, at n = K V / (2 ln C): for
K = V at K^2 / (2 ln C). Least squares, to which the delta rule comes when it reads the pairs again and again (Kaczmarz
1937), recovers K pairs with independent keys exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from linstate.ops import delta_rule, dplr, linear_attention, selective_scan, softmax_attention
from linstate.ops import test_time_training as ttt

SIZE, CODEBOOK = 64, 1024
"""Channels of keys and values of a head, K = V; entries of the codebook, C."""
MINI_BATCH, INNER_RATE, PASSES, SCAN_STATE = 16, 0.05, 16, 16
PAIRS = (16, 32, 48, 64, 80, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Numbers of pairs; all are whole mini-batches."""
EXACT = 1e-3
KINDS = ("orthogonal", "random")

Recurrence = Callable[[Tensor, Tensor], Tensor]
"""What the recurrence answers to each of its keys ``[n, K]`` behind the last of ``[n, K]`` and values ``[n, K]``."""


def _from_state(state: Tensor, k: Tensor) -> Tensor:
    return k @ state[0, 0]  # [n, V]


def _head(x: Tensor) -> Tensor:
    """``[n, K] -> [1, n, 1, K]``."""
    return x[None, :, None]


def _sum(k: Tensor, v: Tensor, g: Tensor | None = None) -> Tensor:
    return _from_state(linear_attention(_head(k), _head(k), _head(v), g, scale=1.0)[1], k)


def _forgetting(k: Tensor, v: Tensor) -> Tensor:
    return _sum(k, v, torch.full((1, len(k), 1), math.log1p(-1 / SIZE)))


def _delta(k: Tensor, v: Tensor, passes: int = 1) -> Tensor:
    ks, vs = _head(k.repeat(passes, 1)), _head(v.repeat(passes, 1))
    return _from_state(delta_rule(ks, ks, vs, torch.ones(ks.shape[:3]), scale=1.0)[1], k)


def _dplr(k: Tensor, v: Tensor) -> Tensor:
    return _from_state(dplr(_head(k), _head(k), _head(v), -_head(k), _head(k), scale=1.0)[1], k)


def _scan(k: Tensor, v: Tensor) -> Tensor:
    return _from_state(selective_scan(_head(k), _head(k), _head(v), torch.zeros_like(_head(v)))[1], k)


def _test_time(k: Tensor, v: Tensor) -> Tensor:
    """TTT-Linear's f(x) = x + layer_norm(W x + b) learns x + sqrt(K) v, whose second part has variance 1, for x = sqrt(K) k.

    Keys are that long because the bias is a channel that all keys share. The inner rate is the best of 1, 1/4, 1/20 and 1/100.
    """
    size = k.shape[1]
    x, one = size**0.5 * k, torch.ones(1, size)
    W = 0.02 * torch.randn(1, size + 1, size, generator=torch.Generator().manual_seed(0))
    rate = torch.full((1, len(k), 1), INNER_RATE / size)
    q, target = _head(x), _head(x + size**0.5 * v)
    state = ttt(
        q,
        q,
        target,
        rate,
        W,
        norm_weight=one,
        norm_bias=torch.zeros_like(one),
        share=torch.ones(MINI_BATCH),
    )[1]
    learned = (W + state["W1"])[0, 0]  # [K + 1, K]
    return F.normalize(F.layer_norm(x @ learned[:-1] + learned[-1], (size,)), dim=-1)


def _softmax(k: Tensor, v: Tensor) -> Tensor:
    """Queries behind all pairs; what they bring themselves is a zero key, far from every query."""
    cache = softmax_attention(_head(k), _head(k), _head(v))[1]
    nothing = torch.zeros_like(_head(k))
    o, _ = softmax_attention(_head(k), nothing, nothing, scale=float(SIZE), initial_state=cache)
    return o[0, :, 0]


@dataclass(frozen=True)
class Case:
    """A recurrence, how it is set, and channels of its keys."""

    answer: Recurrence
    how: str
    size: int = SIZE


CASES: dict[str, Case] = {
    "softmax_attention": Case(_softmax, f"keeps every pair; scale {SIZE}"),
    "linear_attention": Case(_sum, "no decay"),
    "linear_attention, decay": Case(_forgetting, f"decay 1 - 1/{SIZE} a token"),
    "selective_scan": Case(_scan, f"no decay, {SCAN_STATE} entries a channel as in Mamba", SCAN_STATE),
    "delta_rule": Case(_delta, "beta = 1, the pairs read once"),
    "delta_rule, read again": Case(
        partial(_delta, passes=PASSES), f"beta = 1, the pairs read {PASSES} times"
    ),
    "dplr": Case(_dplr, "a = -k, b = k: the delta rule by another op"),
    "test_time_training": Case(_test_time, f"linear inner model, {MINI_BATCH} pairs a mini-batch, read once"),
}
"""state_space is not here: it has no keys, what it keeps is found by its distance only."""


def theory(kind: str, size: int = SIZE) -> float:
    """The number of pairs with keys of ``size`` channels up to which a sum of outer products is expected to recall."""
    return float(size) if kind == "orthogonal" else size * SIZE / (2 * math.log(CODEBOOK))


def keys(kind: str, n: int, size: int, draw: Generator) -> Tensor:
    """Unit keys ``[n, size]``: random, or orthogonal, where those behind the last are the first ones again."""
    if kind == "random":
        return F.normalize(torch.randn(n, size, generator=draw), dim=-1)
    return torch.linalg.qr(torch.randn(size, size, generator=draw)).Q.repeat(-(-n // size), 1)[:n]


@torch.no_grad()
def measure(name: str, kind: str, seeds: int) -> dict[str, dict[str, float]]:
    """By the number of pairs: the share ``recalled``, and the largest ``error`` of an answer, over ``seeds`` drawings."""
    case = CASES[name]
    recalled, error = {}, {}
    for n in PAIRS:
        right, worst = 0, 0.0
        for seed in range(seeds):
            draw = torch.Generator().manual_seed(1000 * n + seed)
            k = keys(kind, n, case.size, draw)
            book = F.normalize(torch.randn(CODEBOOK, SIZE, generator=draw), dim=-1)
            said = torch.randperm(CODEBOOK, generator=draw)[:n]
            o = case.answer(k, book[said])  # [n, V]
            right += int((o @ book.T).argmax(-1).eq(said).sum())
            worst = max(worst, float((o - book[said]).norm(dim=-1).max()))
        recalled[str(n)], error[str(n)] = right / (n * seeds), worst
    return {"recalled": recalled, "error": error}


def recalls(measured: dict[str, dict[str, float]], share: float = 0.99) -> int:
    """The largest number of pairs up to which at least ``share`` is recalled; 0 if there is none."""
    return _last(n for n in PAIRS if measured["recalled"][str(n)] < share)


def exact(measured: dict[str, dict[str, float]]) -> int:
    """The largest number of pairs up to which every answer is the value itself, not only nearest to it."""
    return _last(n for n in PAIRS if measured["error"][str(n)] > EXACT)


def _last(failing: Iterable[int]) -> int:
    """The largest of :data:`PAIRS` before the first that fails."""
    first = next(iter(failing), PAIRS[-1] + 1)
    return max((n for n in PAIRS if n < first), default=0)
