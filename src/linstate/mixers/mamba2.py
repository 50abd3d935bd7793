"""Mamba-2 (SSD): linear attention with a decay per token and head, a short convolution and a skip.

    S_t = exp(g_t) S_{t-1} + k_t v_t^T      o_t = S_t^T q_t + D x_t
    x, k, q = silu(conv(W x))      v = dt x      g = -exp(A_log) dt      dt = softplus(W_dt x + dt_bias)
    y = W_o rms_norm(o * silu(W_z x))

The paper's letters: B is k, C is q, its state size N is our K, its head size P our V; its state is the transpose
of ours. Grouped heads: q and k have ``num_groups`` heads, and the norm is over the channels of a group; ``norm``
False leaves it out, ``norm_before_gate`` makes it ``rms_norm(o) * silu(W_z x)``, and ``multipliers`` are five factors
on what W makes: z, x, B, C and dt (all Falcon-H1). ``dt_limit`` clamps dt from both sides; None is no limit.

Source: Dao & Gu 2024, Transformers are SSMs, arXiv 2405.21060, sections 6 and 7.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from linstate.errors import ConfigError
from linstate.mixers._planned import PlannedMixer
from linstate.mixers.base import divide, head_count
from linstate.mixers.parts import RMSNorm, ShortConvolution, init_log_uniform_dt
from linstate.ops.fused import Operands, Plan
from linstate.types import LayerState


def _limits(dt_limit: Sequence[float | None] | None) -> tuple[float, float]:
    low, high = dt_limit or (0.0, None)
    return low or 0.0, math.inf if high is None else high


class Mamba2(PlannedMixer):
    """See the module. State: ``S [B, H, K, V]``, ``conv [B, W - 1, H V + 2 G K]``."""

    recurrence = "linear_attention"
    equation = "S_t = exp(-A dt) S_{t-1} + dt B x^T, A per head"
    source = "Dao & Gu 2024, arXiv 2405.21060"

    def __init__(
        self,
        d_model: int,
        num_heads: int | None = None,
        head_dim: int = 64,
        state_size: int = 128,
        num_groups: int = 1,
        expand: int = 2,
        conv_width: int = 4,
        dt_limit: tuple[float, float | None] | None = None,
        norm: bool = True,
        norm_eps: float = 1e-5,
        norm_before_gate: bool = False,
        multipliers: Sequence[float] | None = None,
    ) -> None:
        super().__init__(d_model)
        if multipliers is not None and len(multipliers) != 5:
            raise ConfigError(
                f"multipliers must be 5 numbers, for z, x, B, C and dt, got {list(multipliers)}"
            )
        self.norm_before_gate, self.multipliers = norm_before_gate, multipliers
        self.num_heads, self.head_dim = head_count(num_heads, expand * d_model, head_dim), head_dim
        self.num_groups, self.state_size, self.dt_limit = num_groups, state_size, dt_limit
        divide(self.num_heads, num_groups, "num_heads into num_groups")
        inner, keys = self.num_heads * head_dim, num_groups * state_size
        self.xbc_sizes = [inner, keys, keys]
        self.sizes = [inner, sum(self.xbc_sizes), self.num_heads]  # z, xBC, dt
        self.in_proj = nn.Linear(d_model, sum(self.sizes), bias=False)
        self.conv = ShortConvolution(sum(self.xbc_sizes), conv_width, bias=True)
        self.A_log = nn.Parameter(torch.empty(self.num_heads).uniform_(1, 16).log())
        self.dt_bias = nn.Parameter(init_log_uniform_dt(self.num_heads))
        self.D = nn.Parameter(torch.ones(self.num_heads))
        self.norm = RMSNorm(inner, norm_eps, groups=num_groups) if norm else nn.Identity()
        self.out_proj = nn.Linear(inner, d_model, bias=False)
        self.plan = Plan(
            recurrence="linear_attention",
            hk=num_groups,
            hv=self.num_heads,
            k=state_size,
            v=head_dim,
            q_at=inner + keys,
            k_at=inner,
            v_at=0,
            scale=1.0,
            norm_eps=norm_eps,
            conv=(0, inner + 2 * keys, conv_width),
            decay="head",
            limits=_limits(dt_limit),
            stepped_values=True,
            norm="group" if norm else "none",
            gate="silu",
            gate_first=not norm_before_gate,
        )

    def project(
        self, x: Tensor, state: LayerState, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Operands, LayerState]:
        z, xbc, dt = self._project(x).split(self.sizes, dim=-1)
        operands = Operands(
            weight=self.conv.weight,
            bias=self.conv.bias,
            step=dt,
            rate=self.A_log,
            step_bias=self.dt_bias,
            skip=self.D,
            norm=getattr(self.norm, "weight", None),
            z=z,
        )
        return xbc, operands, {}

    def _project(self, x: Tensor) -> Tensor:
        """z, x, B, C and dt, side by side."""
        projected = self.in_proj(x)
        if self.multipliers is None:
            return projected
        parts = projected.split([self.sizes[0], *self.xbc_sizes, self.num_heads], dim=-1)
        return torch.cat([part * c for part, c in zip(parts, self.multipliers, strict=True)], dim=-1)

    def init_state(self, batch: int, *, device: torch.device | str | None = None) -> LayerState:
        matrix = self.zeros(batch, self.num_heads, self.state_size, self.head_dim, device=device)
        return {"S": matrix, "conv": self.conv.init_state(batch, device or self.device)}

    def recurrence_flops(self, tokens: int) -> int:
        return tokens * self.num_heads * self.state_size * self.head_dim * 5
