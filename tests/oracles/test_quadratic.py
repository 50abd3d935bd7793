"""Mixers against the T x T formulas of their papers: a matrix of weights times the values, no state anywhere."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linstate.mixers.attention import Attention
from linstate.mixers.linear_transformer import LinearTransformer
from linstate.mixers.retnet import RetNet
from linstate.mixers.sliding_window import SlidingWindow
from oracles.oracle import agree, by_pieces, causal, fla_naive, hold, pieces, randomise

pytestmark = pytest.mark.oracle

D, H, K = 48, 3, 16


def projected(x: Tensor, weight: Tensor, sizes: list[int]) -> list[Tensor]:
    """Head-first parts of a projection: ``[B, H, T, size]``."""
    parts = F.linear(x, weight).split([H * size for size in sizes], dim=-1)
    return [part.unflatten(-1, (H, -1)).transpose(1, 2) for part in parts]


def turned(x: Tensor) -> Tensor:
    """Rotary embedding with complex numbers: channels i and i + K/2 are one number that turns."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2])[:, None] * 10000.0 ** (-torch.arange(half) / half)
    z = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.polar(
        torch.ones(()).double(), angle.double()
    )
    return torch.cat([z.real, z.imag], dim=-1).float()


@torch.no_grad()
def test_linear_transformer() -> None:
    """Equation 7 of the paper: ``V'_i = sum_j phi(Q_i).phi(K_j) V_j / sum_j phi(Q_i).phi(K_j)``."""
    torch.manual_seed(0)
    ours = LinearTransformer(D, num_heads=H, head_dim=K)
    randomise(ours)
    inputs = pieces(D)
    x = torch.cat(inputs, dim=1)
    q, k, v = projected(x, ours.in_proj.weight, [K, K, K])
    weights = ((F.elu(q) + 1) @ (F.elu(k) + 1).transpose(-1, -2)) * causal(x.shape[1])
    o = (weights / weights.sum(-1, keepdim=True)) @ v
    y = F.linear(o.transpose(1, 2).flatten(-2), ours.out_proj.weight)
    hold(ours, by_pieces(y, inputs), inputs)


@torch.no_grad()
def test_retnet() -> None:
    """Section 2.1, the parallel form: ``(Q K^T * D) V`` with ``D_nm = gamma^(n-m)``, then equation 8."""
    torch.manual_seed(0)
    ours = RetNet(D, num_heads=H, head_dim=K)
    randomise(ours)
    inputs = pieces(D)
    x = torch.cat(inputs, dim=1)
    q, k, v, z = projected(x, ours.in_proj.weight, [K, K, 2 * K, 2 * K])
    o = retention(turned(q), turned(k), v)
    normed = F.group_norm(
        o.transpose(1, 2).reshape(-1, H * 2 * K), H, ours.norm.weight, ours.norm.bias, 1e-5
    ).unflatten(0, x.shape[:2])
    y = F.linear(normed * F.silu(z.transpose(1, 2).flatten(-2)), ours.out_proj.weight)
    hold(ours, by_pieces(y, inputs), inputs)


def retention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    gamma = 1 - 2.0 ** (-5 - torch.arange(H, dtype=torch.float64))
    place = torch.arange(q.shape[-2])
    apart = (place[:, None] - place).clamp(min=0)
    decay = (gamma[:, None, None] ** apart * causal(len(place))).float()
    return (q @ k.transpose(-1, -2) * K**-0.5 * decay) @ v


def test_retention_is_fla_s() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, H, 77, size) for size in (K, K, 2 * K))
    agree("retention", retention(q, k, v), fla_naive("retention/naive").naive_retention(q, k, v))


@pytest.mark.parametrize("rotary_dim", [K, 6])
@pytest.mark.parametrize("kv", [1, 3])
@pytest.mark.parametrize("window", [None, 10])
@torch.no_grad()
def test_attention(window: int | None, kv: int, rotary_dim: int) -> None:
    torch.manual_seed(0)
    options = {"num_heads": H, "num_kv_heads": kv, "head_dim": K, "rotary_dim": rotary_dim}
    ours = Attention(D, **options) if window is None else SlidingWindow(D, window, **options)
    randomise(ours)
    inputs = pieces(D)
    x = torch.cat(inputs, dim=1)
    q, k, v = (
        part.unflatten(-1, (-1, K)).transpose(1, 2)
        for part in F.linear(x, ours.in_proj.weight).split([H * K, kv * K, kv * K], dim=-1)
    )
    seen = causal(x.shape[1])
    if window is not None:
        seen = seen & ~seen.tril(-window)
    q, k = (torch.cat([turned(x[..., :rotary_dim]), x[..., rotary_dim:]], dim=-1) for x in (q, k))
    o = F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)
    y = F.linear(o.transpose(1, 2).flatten(-2), ours.out_proj.weight)
    hold(ours, by_pieces(y, inputs), inputs)
