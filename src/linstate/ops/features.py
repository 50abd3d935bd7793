"""Feature maps and normalisations of queries and keys, shared by the mixers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linstate.types import state_dtype


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """``x / sqrt(|x|^2 + eps)`` over the last axis, computed in float32 (float64 for float64), in x's dtype."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def elu_plus_one(x: Tensor) -> Tensor:
    """``elu(x) + 1`` (Linear Transformer)."""
    return F.elu(x) + 1


def orthogonal_gaussian(
    count: int, size: int, *, like: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """``[count, size]`` rows, each a standard normal vector, orthogonal to the others of its block of ``size`` rows.

    Source: Choromanski 2021, arXiv 2009.14794, section 2.4. Made in float64 on the CPU where a generator is given there.
    """
    device = like.device if generator is None else generator.device
    blocks = -(-count // size)
    made = torch.randn(2, blocks, size, size, device=device, dtype=torch.float64, generator=generator)
    directions, triangle = torch.linalg.qr(made[0])  # [blocks, size, size]
    directions = directions * triangle.diagonal(dim1=-2, dim2=-1).sign()[:, None]  # uniform over rotations
    rows = directions * made[1].norm(dim=-1, keepdim=True)
    return rows.flatten(0, 1)[:count].to(like)


def log_favor(x: Tensor, w: Tensor) -> Tensor:
    """``w_i . x - |x|^2 / 2``: the logarithm of FAVOR+'s positive features, so that E exp(.)_q exp(.)_k = exp(q . k).

    ``x [..., K]``, ``w [M, K]`` -> ``[..., M]``. Source: Choromanski 2021, arXiv 2009.14794, lemma 1.
    """
    return x @ w.transpose(0, 1) - x.square().sum(-1, keepdim=True) / 2


def taylor_exp(x: Tensor) -> Tensor:
    """Features with ``phi(x) . phi(y) = 1 + x . y + (x . y)^2 / 2``, the exponential's Taylor polynomial of degree 2.

    ``[..., K] -> [..., 1 + K + K (K + 1) / 2]``: each product of two channels once. Source: Arora 2024, arXiv
    2402.18668, section 4.1; Zhang 2024, arXiv 2402.04347.
    """
    size = x.shape[-1]
    row, column = torch.triu_indices(size, size, device=x.device)
    weight = torch.where(row == column, 0.5**0.5, 1.0).to(x.dtype)
    return torch.cat([torch.ones_like(x[..., :1]), x, x[..., row] * x[..., column] * weight], dim=-1)


def dpfp(x: Tensor, nu: int) -> Tensor:
    """``r_i r_{i - j}`` for j = 1 .. nu, r = relu of x and -x: deterministic, sparse features ``[..., K] -> [..., 2 K nu]``.

    Source: Schlag, Irie, Schmidhuber 2021, arXiv 2102.11174, section 5.
    """
    r = F.relu(torch.cat([x, -x], dim=-1))  # [..., 2 K]
    return torch.cat([r * r.roll(shift, dims=-1) for shift in range(1, nu + 1)], dim=-1)


def sum_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """``x / (sum of x + eps)`` over the last axis, for x >= 0 (Schlag 2021, arXiv 2102.11174, section 4.2)."""
    return x / (x.sum(-1, keepdim=True) + eps)


def positive(x: Tensor) -> Tensor:
    """``x + 1/2`` for x >= 0, else ``sigmoid(x)``: a candidate that stays above zero (minGRU, minLSTM)."""
    return torch.where(x >= 0, x + 0.5, x.sigmoid())


def rotate(
    position: Tensor, *tensors: Tensor, base: float = 10000.0, size: int | None = None
) -> list[Tensor]:
    """Rotary embedding (Su 2021, arXiv 2104.09864): channels i and i + size/2 turn by ``position * base^(-2 i / size)``.

    Args:
        position: int64 ``[B, T]``. Angles are computed in float64: float32 is off by 0.03 at a million tokens.
        tensors: ``[B, T, H, K]`` each.
        size: the first ``size`` channels turn, the others stay; default all.
    """
    size = tensors[0].shape[-1] if size is None else size
    speed = base ** (
        -torch.arange(0, size, 2, device=position.device, dtype=torch.float64) / size
    )  # [size / 2]
    angle = position[..., None, None] * speed  # [B, T, 1, size / 2]
    wide = state_dtype(*tensors)
    cos, sin = angle.cos().to(wide), angle.sin().to(wide)
    turned = []
    for x in tensors:
        first, second, still = x.split([size // 2, size // 2, x.shape[-1] - size], dim=-1)
        parts = [first * cos - second * sin, second * cos + first * sin]
        turned.append(torch.cat([*(part.to(x.dtype) for part in parts), still], dim=-1))
    return turned
