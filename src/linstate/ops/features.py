"""Feature maps and normalisations of queries and keys, shared by the mixers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """``x / sqrt(|x|^2 + eps)`` over the last axis, computed in float32 (float64 for float64), in x's dtype."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def elu_plus_one(x: Tensor) -> Tensor:
    """``elu(x) + 1`` (Linear Transformer)."""
    return F.elu(x) + 1


def positive(x: Tensor) -> Tensor:
    """``x + 1/2`` for x >= 0, else ``sigmoid(x)``: a candidate that stays above zero (minGRU, minLSTM)."""
    return torch.where(x >= 0, x + 0.5, x.sigmoid())
