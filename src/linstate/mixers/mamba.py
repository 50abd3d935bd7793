"""Mamba (S6): a scan whose step size, input and output are made from the token, behind a short convolution.

    S_t[n, d] = exp(dt_t[d] A[n, d]) S_{t-1}[n, d] + dt_t[d] B_t[n] x_t[d]      o_t[d] = sum_n C_t[n] S_t[n, d] + D[d] x_t[d]
    x = silu(conv(W_x u))      A = -exp(A_log)      dt = softplus(W_dt (W_r x) + dt_bias)      B, C = W_B x, W_C x
    y = W_o (o * silu(W_z u))

The paper's letters: u is the layer's input, its Delta is dt, its state h is the transpose of S, its state size N is
our K; W_r narrows to ``dt_rank`` channels. The scan's q is C, its k is B, its v is dt x, its g is dt.

``norm`` puts an RMS norm on W_r x, B and C each: "rmsnorm" (Jamba) or, without a weight, "srmsnorm" (Falcon-Mamba).

Source: Gu & Dao 2023, Mamba, arXiv 2312.00752, sections 3.2 to 3.4 and algorithm 2; norms: Lieber 2024, Jamba,
arXiv 2403.19887, section 6.4; Zuo 2024, Falcon Mamba, arXiv 2410.05355.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linstate.errors import ConfigError
from linstate.mixers.base import Mixer
from linstate.mixers.parts import RMSNorm, ShortConvolution, init_log_uniform_dt
from linstate.ops import selective_scan
from linstate.types import LayerState, state_dtype


class Mamba(Mixer):
    """See the module. State: ``S [B, 1, N, E]`` for E inner channels, ``conv [B, W - 1, E]``."""

    recurrence = "selective_scan"
    equation = "S_t = exp(A dt) * S_{t-1} + dt B x^T, A per channel and entry"
    source = "Gu & Dao 2023, arXiv 2312.00752"

    def __init__(
        self,
        d_model: int,
        state_size: int = 16,
        expand: int = 2,
        conv_width: int = 4,
        dt_rank: int | None = None,
        norm: str | None = None,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__(d_model)
        if norm not in (None, "rmsnorm", "srmsnorm"):
            raise ConfigError(f"norm must be None, 'rmsnorm' or 'srmsnorm', got {norm!r}")
        self.inner, self.state_size = expand * d_model, state_size
        rank = -(-d_model // 16) if dt_rank is None else dt_rank
        self.sizes = [rank, state_size, state_size]  # dt, B, C
        self.in_proj = nn.Linear(d_model, 2 * self.inner, bias=False)  # x, z
        self.conv = ShortConvolution(self.inner, conv_width, bias=True)
        self.x_proj = nn.Linear(self.inner, sum(self.sizes), bias=False)
        self.dt_norm, self.B_norm, self.C_norm = (
            RMSNorm(size, norm_eps, weight=norm == "rmsnorm") if norm else nn.Identity()
            for size in self.sizes
        )
        self.dt_proj = nn.Linear(rank, self.inner, bias=False)
        nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        self.dt_proj.keep_init = True  # type: ignore[assignment]
        self.dt_bias = nn.Parameter(init_log_uniform_dt(self.inner))
        self.A_log = nn.Parameter(torch.arange(1.0, state_size + 1).log().repeat(self.inner, 1))  # [E, N]
        self.D = nn.Parameter(torch.ones(self.inner))
        self.out_proj = nn.Linear(self.inner, d_model, bias=False)

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        shared: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, LayerState]:
        state = state or {}
        inner, z = self.in_proj(x).chunk(2, dim=-1)
        inner, tail = self.conv(inner, state.get("conv"), cu_seqlens)
        low, B, C = self.x_proj(inner).split(self.sizes, dim=-1)
        low, B, C = self.dt_norm(low), self.B_norm(B), self.C_norm(C)
        wide = state_dtype(x)
        dt = F.softplus(self.dt_proj(low).to(wide) + self.dt_bias.to(wide))  # [B, T, E]
        o, matrix = selective_scan(
            C[:, :, None],
            B[:, :, None],
            (inner * dt).to(inner.dtype)[:, :, None],
            dt[:, :, None],
            -self.A_log.to(wide).exp().t()[None],
            initial_state=state.get("S"),
            cu_seqlens=cu_seqlens,
        )
        o = o[:, :, 0] + inner * self.D  # [B, T, E]
        return self.out_proj(o * F.silu(z)), {"S": matrix, "conv": tail}

    def init_state(self, batch: int, *, device: torch.device | str | None = None) -> LayerState:
        matrix = self.zeros(batch, 1, self.state_size, self.inner, device=device)
        return {"S": matrix, "conv": self.conv.init_state(batch, device or self.device)}

    def recurrence_flops(self, tokens: int) -> int:
        return tokens * self.inner * self.state_size * 6
