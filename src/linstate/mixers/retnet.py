"""RetNet: retention, linear attention with a fixed decay for each head and rotated q and k.

    S_t = exp(g_h) S_{t-1} + k_t v_t^T      o_t = S_t^T q_t      g_h = log(1 - 2^(-5 - h)), h = 0, 1, ...
    q = rotate(W_q x, t)      k = rotate(W_k x, t)      v = W_v x
    y = W_o (group_norm(o) * silu(W_g x))

The paper's gamma is ``exp(g_h)``, its Theta the rotation; its xPos has no other scale than gamma. ``norm`` "rmsnorm" puts
an RMS norm on each head, all with the same weights, in place of the group norm (FLA's models).

Source: Sun 2023, Retentive Network, arXiv 2307.08621, sections 2.1 and 2.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linstate.errors import ConfigError
from linstate.mixers.base import Mixer, divide, head_count
from linstate.mixers.parts import HeadNorm, RMSNorm, heads, positions, rotate
from linstate.ops import linear_attention
from linstate.ops.native import mixer as native_mixer
from linstate.types import MOST_TOKENS, LayerState, Range, state_dtype


class RetNet(Mixer):
    """See the module. State: ``S [B, H, K, V]``, ``position [B]`` int64."""

    recurrence = "linear_attention"
    equation = "S_t = exp(g_h) S_{t-1} + k v^T, g fixed per head"
    source = "Sun 2023, arXiv 2307.08621"
    composition = "refused"  # keys carry absolute positions

    def __init__(
        self,
        d_model: int,
        num_heads: int | None = None,
        head_dim: int = 64,
        v_head_dim: int | None = None,
        rotary_base: float = 10000.0,
        norm_eps: float = 1e-5,
        norm: str = "groupnorm",
    ) -> None:
        super().__init__(d_model)
        divide(head_dim, 2, "head_dim of rotated channels")
        if norm not in ("groupnorm", "rmsnorm"):
            raise ConfigError(f"norm must be 'groupnorm' or 'rmsnorm', got {norm!r}")
        self.num_heads = head_count(num_heads, d_model, head_dim)
        self.k_dim, self.v_dim = head_dim, 2 * head_dim if v_head_dim is None else v_head_dim
        self.rotary_base = rotary_base
        keys, values = self.num_heads * self.k_dim, self.num_heads * self.v_dim
        self.sizes = [keys, keys, values, values]  # q, k, v, z
        self.in_proj = nn.Linear(d_model, sum(self.sizes), bias=False)
        grouped = norm == "groupnorm"
        self.norm = (
            HeadNorm(self.num_heads, self.v_dim, norm_eps) if grouped else RMSNorm(self.v_dim, norm_eps)
        )
        self.out_proj = nn.Linear(values, d_model, bias=False)
        self.plan = native_mixer.Plan(
            recurrence="linear_attention",
            hk=self.num_heads,
            hv=self.num_heads,
            k=self.k_dim,
            v=self.v_dim,
            q_at=0,
            k_at=keys,
            v_at=2 * keys,
            scale=self.k_dim**-0.5,
            norm_eps=norm_eps,
            rotary_base=rotary_base,
            decay="fixed",
            norm="centred" if grouped else "head",
            gate="silu",
        )

    def decay(self, like: Tensor) -> Tensor:
        """g ``[H]``."""
        head = torch.arange(self.num_heads, device=like.device, dtype=torch.float64)
        return torch.log1p(-(2.0 ** (-5 - head))).to(state_dtype(like))

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        shared: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, LayerState]:
        state = state or {}
        projected = self.in_proj(x)
        q, k, v, z = projected.split(self.sizes, dim=-1)
        position, after = positions(state.get("position"), x, cu_seqlens)
        if native_mixer.serves(self.recurrence, self, projected, state.get("S"), cu_seqlens):
            y, matrix, _ = native_mixer.step(
                self.plan,
                projected,
                state.get("S"),
                rate=self.decay(x),
                norm=self.norm.weight,
                norm_bias=getattr(self.norm, "bias", None),
                z=z,
                position=position,
            )
            return self.out_proj(y), {"S": matrix, "position": after}
        q, k = rotate(position, heads(q, self.num_heads), heads(k, self.num_heads), base=self.rotary_base)
        v = heads(v, self.num_heads)
        o, matrix = linear_attention(
            q, k, v, self.decay(x), initial_state=state.get("S"), cu_seqlens=cu_seqlens
        )  # [B, T, H, V]
        normed = self.norm(o).view_as(z)  # [B, T, H * V]
        return self.out_proj(normed * F.silu(z)), {"S": matrix, "position": after}

    def init_state(self, batch: int, *, device: torch.device | str | None = None) -> LayerState:
        matrix = self.zeros(batch, self.num_heads, self.k_dim, self.v_dim, device=device)
        return {"S": matrix, "position": torch.zeros(batch, dtype=torch.int64, device=matrix.device)}

    def ranges(self) -> dict[str, Range]:
        return {"position": (0, MOST_TOKENS)}

    def recurrence_flops(self, tokens: int) -> int:
        return tokens * self.num_heads * self.k_dim * self.v_dim * 5
