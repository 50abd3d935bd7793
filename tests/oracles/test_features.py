"""Mixers of feature maps against their papers' formulas: T x T weights or a loop over tokens, features written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linstate.mixers.base import Place
from linstate.mixers.based import Based
from linstate.mixers.dpfp import DPFP
from linstate.mixers.performer import Performer
from linstate.mixers.transnormer import TransNormer
from linstate.models.feed_forward import SGLU
from linstate.ops.features import dpfp, log_favor, orthogonal_gaussian, taylor_exp
from oracles.fla_layers import fla_module
from oracles.oracle import agree, by_pieces, causal, fla_naive, hold, pieces, randomise

pytestmark = pytest.mark.oracle

D, H, K = 48, 3, 16


def head_first(x: Tensor, weight: Tensor, sizes: list[int]) -> list[Tensor]:
    """Parts of a projection, ``[B, H, T, size]`` each."""
    parts = F.linear(x, weight).split([H * size for size in sizes], dim=-1)
    return [part.unflatten(-1, (H, -1)).transpose(1, 2) for part in parts]


def projected_back(o: Tensor, weight: Tensor) -> Tensor:
    return F.linear(o.transpose(1, 2).flatten(-2), weight)


@torch.no_grad()
def test_based() -> None:
    """FLA's parallel form, ``1 + s + s^2 / 2`` for each pair of tokens, and its features (in another order)."""
    torch.manual_seed(0)
    ours = Based(D, num_heads=H, head_dim=K, feature_dim=6)
    randomise(ours)
    inputs = pieces(D)
    q, k, v = head_first(torch.cat(inputs, dim=1), ours.in_proj.weight, [6, 6, K])
    o = fla_naive("based/naive").naive_parallel_based(q, k, v)
    hold(ours, by_pieces(projected_back(o, ours.out_proj.weight), inputs), inputs)


@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint", "ignore:None of the inputs")
def test_taylor_features_are_fla_s() -> None:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    theirs = fla_module("modules.feature_map").TaylorFeatureMap(6)(x)
    ours = taylor_exp(x * 6**-0.25)
    agree("features", ours.sort(-1).values, theirs.sort(-1).values)


@pytest.mark.parametrize("nu", [1, 3])
@torch.no_grad()
def test_dpfp(nu: int) -> None:
    """The features of section 5 and the delta rule of section 4.2, token by token."""
    torch.manual_seed(0)
    ours = DPFP(D, num_heads=H, head_dim=K, nu=nu)
    randomise(ours)
    inputs = pieces(D)
    x = torch.cat(inputs, dim=1)
    rows = ours.in_proj.weight
    q, k, v = head_first(x, rows[: 3 * H * K], [K, K, K])
    beta = F.linear(x, rows[3 * H * K :]).sigmoid().transpose(1, 2)  # [B, H, T]

    def phi(x: Tensor) -> Tensor:
        r = torch.cat([x, -x], dim=-1).clamp(min=0)
        psi = torch.stack([r[..., i] * r[..., i - j] for j in range(1, nu + 1) for i in range(2 * K)], dim=-1)
        return psi / psi.sum(-1, keepdim=True)

    q, k = phi(q), phi(k)
    fast, outputs, states = torch.zeros(2, H, K, 2 * K * nu), [], []  # the paper's W: transposed
    for t in range(x.shape[1]):
        old = (fast @ k[:, :, t, :, None]).squeeze(-1)
        change = beta[:, :, t, None] * (v[:, :, t] - old)
        fast = fast + change[..., None] * k[:, :, t, None, :]
        outputs.append((fast @ q[:, :, t, :, None]).squeeze(-1) * K**-0.5)
        states.append(fast.transpose(-1, -2))
    y = projected_back(torch.stack(outputs, dim=2), ours.out_proj.weight)
    ends = torch.tensor([piece.shape[1] for piece in inputs]).cumsum(0) - 1
    expected = [(part, {"S": states[end]}) for (part, _), end in zip(by_pieces(y, inputs), ends, strict=True)]
    hold(ours, expected, inputs)


def test_dpfp_features_are_fla_s() -> None:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    agree("features", dpfp(x, 3), fla_module("modules.feature_map").DPFPFeatureMap(6, nu=3)(x))


@pytest.mark.parametrize("index", [0, 1])
@torch.no_grad()
def test_transnormer(index: int) -> None:
    """Section 3.1: ``a_ts = q_t . k_s lambda^(t - s)``, in the first layer with ``cos(theta (t - s))`` for each channel."""
    torch.manual_seed(0)
    ours = TransNormer(D, num_heads=H, head_dim=K, place=Place(index, 2, first=index == 0))
    randomise(ours, theta=lambda u: u)
    inputs = pieces(D)
    x = torch.cat(inputs, dim=1)
    q, k, v, u = head_first(x, ours.in_proj.weight, [K] * 4)
    q, k = F.silu(q).double(), F.silu(k).double()
    place = torch.arange(x.shape[1], dtype=torch.float64)
    apart = (place[:, None] - place).clamp(min=0)  # [T, T]
    if index == 0:
        turned = (
            ours.theta.double()[:, None, None] * (place[:, None] - place)[..., None]
        ).cos()  # [H, T, T, K]
        weights = torch.einsum("bhtk,bhsk,htsk->bhts", q, k, turned)
    else:
        weights = q @ k.transpose(-1, -2)
    slope = 2.0 ** (-8 * torch.arange(1, H + 1, dtype=torch.float64) / H) * (1 - index + 1e-5)
    weights = weights * torch.exp(-slope[:, None, None] * apart) * causal(x.shape[1])
    o = (weights @ v.double()).transpose(1, 2).flatten(-2)
    normed = o / o.square().mean(-1, keepdim=True).sqrt() * u.transpose(1, 2).flatten(-2)
    hold(ours, by_pieces(F.linear(normed.float(), ours.out_proj.weight), inputs), inputs)


@torch.no_grad()
def test_sglu() -> None:
    torch.manual_seed(0)
    ours, x = SGLU(8, 12), torch.randn(2, 5, 8)
    gate, up = ours.up.weight.split(12)
    agree("sglu", ours(x)[0], ((x @ gate.T) * (x @ up.T)) @ ours.down.weight.T)


def performer(features: int) -> Performer:
    ours = Performer(D, num_heads=H, head_dim=K, num_features=features)
    randomise(ours)
    return ours


@torch.no_grad()
def test_performer() -> None:
    """Lemma 1 as it stands: exponentials, sums over all tokens before, a quotient; no maximum anywhere."""
    torch.manual_seed(0)
    ours = performer(40)
    inputs = pieces(D)
    x = torch.cat(inputs, dim=1)
    q, k, v = (part.double() for part in head_first(x, ours.in_proj.weight, [K, K, K]))
    phi = [
        (t @ ours.w.double().T - t.square().sum(-1, keepdim=True) / 2).exp() for t in (q / 2, k / 2)
    ]  # K^-1/4 is 1/2
    weights = (phi[0] @ phi[1].transpose(-1, -2)) * causal(x.shape[1])
    o = weights / weights.sum(-1, keepdim=True) @ v
    y = projected_back(o.float(), ours.out_proj.weight)
    expected = by_pieces(y, inputs)
    hold(ours, expected, inputs)
    sums = (phi[1].transpose(-1, -2) @ torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)).float()
    _, state = ours(x)
    agree("state", state["S"] * state["m"].exp()[..., None, None], sums)
    _, state = ours(100 * x)
    assert all(t.isfinite().all() for t in state.values()), "large keys overflow"
    halves = [ours(part)[1] for part in x.split(30, dim=1)]
    both = Performer.add(Performer.add(halves[0], halves[1]), halves[2])
    agree("sum of states", both["S"] * both["m"].exp()[..., None, None], sums)


def test_features_are_orthogonal_and_normal() -> None:
    draw = torch.Generator().manual_seed(0)
    w = orthogonal_gaussian(4096 * K, K, like=torch.zeros((), dtype=torch.float64), generator=draw)
    products = w.unflatten(0, (-1, K)) @ w.unflatten(0, (-1, K)).transpose(-1, -2)
    lengths = products.diagonal(dim1=-2, dim2=-1)
    assert (products - torch.diag_embed(lengths)).abs().max() < 1e-9 * lengths.max(), (
        "not orthogonal in its block"
    )
    assert (w.mean(0).abs() < 0.02).all() and ((w.T @ w / len(w) - torch.eye(K)).abs() < 0.02).all()
    assert abs(float(lengths.var()) / (2 * K) - 1) < 0.05, (
        "squared lengths are chi-squared with K degrees of freedom"
    )


@torch.no_grad()
def test_performer_s_kernel_is_unbiased() -> None:
    """The mean over many draws is ``exp(q . k)`` for every pair, as near as their spread lets it be."""
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(20, K, generator=draw, dtype=torch.float64) * K**-0.5 for _ in range(2))
    w = orthogonal_gaussian(20_000 * K, K, like=q, generator=draw)
    phi = [log_favor(t, w).exp().unflatten(1, (-1, K)) for t in (q, k)]  # [20, 20000, K]: draws of K features
    draws = torch.einsum("idm,jdm->ijd", *phi) / K
    exact = (q @ k.T).exp()
    off = (draws.mean(-1) - exact) / (draws.std(-1) * draws.shape[-1] ** -0.5)  # in standard errors
    assert off.abs().max() < 4.5 and abs(float(off.mean())) < 0.5, (
        f"biased: {off.mean():.2f}, up to {off.abs().max():.1f}"
    )
    assert ((draws.mean(-1) / exact - 1).abs() < 0.03).all()
    alone = (log_favor(q, torch.randn(20_000 * K, K, generator=draw, dtype=torch.float64)).exp()).unflatten(
        1, (-1, K)
    )
    assert (phi[0].mean(-1).var(-1) < alone.mean(-1).var(-1)).all(), (
        "orthogonal features spread less than independent ones"
    )


@torch.no_grad()
def test_performer_s_error_falls_as_the_root_of_its_features() -> None:
    counts, redraws = [32, 128, 512], 128
    torch.manual_seed(0)
    x, errors = torch.randn(1, 40, D, dtype=torch.float64) / 4, []
    for count in counts:
        torch.manual_seed(1)
        ours = performer(count).double()
        q, k, v = head_first(x, ours.in_proj.weight, [K, K, K])
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        exact, draw, squares = projected_back(o, ours.out_proj.weight), torch.Generator().manual_seed(2), []
        for _ in range(redraws):
            ours.redraw(draw)
            squares.append((ours(x)[0] - exact).square().mean())
        errors.append(float((torch.stack(squares).mean() / exact.square().mean()).sqrt()))
    halvings = torch.log2(torch.tensor(errors[:-1]) / torch.tensor(errors[1:]))
    assert ((halvings - 1).abs() < 0.1).all(), (
        f"four times the features should halve the error: {errors} for {counts}"
    )
    assert errors[-1] < 0.05
