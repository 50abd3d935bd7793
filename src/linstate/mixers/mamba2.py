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
import torch.nn.functional as F
from torch import Tensor, nn

from linstate.errors import ConfigError
from linstate.mixers.base import Mixer, divide, head_count
from linstate.mixers.parts import RMSNorm, ShortConvolution, heads, init_log_uniform_dt
from linstate.ops import linear_attention
from linstate.ops.native import mixer as native_mixer
from linstate.types import LayerState, state_dtype


def _limits(dt_limit: Sequence[float | None] | None) -> tuple[float, float]:
    low, high = dt_limit or (0.0, None)
    return low or 0.0, math.inf if high is None else high


class Mamba2(Mixer):
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
        plan = native_mixer.Plan(
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
            norm="group",
            gate="silu",
            gate_first=not norm_before_gate,
        )
        self.plan = plan if norm else None  # the native step ends with the norm

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        shared: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, LayerState]:
        state = state or {}
        z, xbc, dt = self._project(x).split(self.sizes, dim=-1)
        if self.plan and native_mixer.serves(
            self.recurrence, self, xbc, state.get("S"), cu_seqlens, self.plan.of_many
        ):
            y, matrix, tail = native_mixer.step(
                self.plan,
                xbc,
                state.get("S"),
                state.get("conv"),
                weight=self.conv.weight,
                bias=self.conv.bias,
                step=dt,
                rate=self.A_log,
                step_bias=self.dt_bias,
                skip=self.D,
                norm=getattr(self.norm, "weight", None),
                z=z,
                cu_seqlens=cu_seqlens,
            )
            return self.out_proj(y), {"S": matrix, "conv": tail}
        xbc, tail = self.conv(xbc, state.get("conv"), cu_seqlens)
        inner, B, C = xbc.split(self.xbc_sizes, dim=-1)
        wide = state_dtype(x)
        dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide))  # [B, T, H]
        if self.dt_limit is not None:
            dt = dt.clamp(*self.dt_limit)
        v = heads(inner, self.num_heads)  # [B, T, H, V]
        o, matrix = linear_attention(
            heads(C, self.num_groups),
            heads(B, self.num_groups),
            (v * dt[..., None]).to(v.dtype),
            -self.A_log.to(wide).exp() * dt,
            scale=1.0,
            initial_state=state.get("S"),
            cu_seqlens=cu_seqlens,
        )
        o = (o + v * self.D[:, None]).flatten(-2)  # [B, T, H V]
        y = self.norm(o) * F.silu(z) if self.norm_before_gate else self.norm(o * F.silu(z))
        return self.out_proj(y), {"S": matrix, "conv": tail}

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
