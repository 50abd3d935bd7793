"""Parts that several mixers are made of; each has one home and one name here."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linstate.ops import causal_conv1d


def heads(x: Tensor, count: int) -> Tensor:
    """``[B, T, H * D] -> [B, T, H, D]``."""
    return x.unflatten(-1, (count, -1))


class RMSNorm(nn.Module):
    """``x / rms(x) * weight`` over the last axis, computed in float32 (float64 for float64)."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        return F.rms_norm(wide, (x.shape[-1],), self.weight.to(wide.dtype), self.eps).to(x.dtype)


class GatedRMSNorm(RMSNorm):
    """``rms_norm(o) * gate(z)`` over the last axis: the output gate of most mixers. ``gate``: "silu" or "sigmoid"."""

    def __init__(self, size: int, eps: float = 1e-6, gate: str = "silu") -> None:
        super().__init__(size, eps)
        self.gate = F.silu if gate == "silu" else torch.sigmoid

    def forward(self, o: Tensor, z: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(o) * self.gate(z)


class ShortConvolution(nn.Module):
    """Depthwise causal convolution over the last ``width`` tokens with SiLU; its state is ``[B, W - 1, D]``."""

    def __init__(self, channels: int, width: int = 4, *, bias: bool = False, activation: str | None = "silu") -> None:
        super().__init__()
        self.width, self.channels, self.activation = width, channels, activation
        self.weight = nn.Parameter(torch.empty(channels, width).uniform_(-(width**-0.5), width**-0.5))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(self, x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``x [B, T, D]`` -> y ``[B, T, D]`` and the last W - 1 inputs."""
        return causal_conv1d(
            x, self.weight, self.bias, activation=self.activation, initial_state=state, cu_seqlens=cu_seqlens
        )

    def init_state(self, batch: int, device: torch.device | str | None) -> Tensor:
        return torch.zeros(batch, self.width - 1, self.channels, device=device, dtype=state_dtype_of(self.weight))


def state_dtype_of(weight: Tensor) -> torch.dtype:
    """The dtype of states of a module with this weight: float64 for a float64 module, else float32."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def init_log_uniform_dt(size: int, low: float = 1e-3, high: float = 0.1) -> Tensor:
    """A bias so that ``softplus(bias)`` is log-uniform in [low, high] (Mamba's step sizes)."""
    lo, hi = torch.tensor(low).log().item(), torch.tensor(high).log().item()
    dt = torch.exp(torch.empty(size).uniform_(lo, hi)).clamp(min=1e-4)
    return dt + torch.log(-torch.expm1(-dt))
