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
from torch import Tensor, nn

from linstate.errors import ConfigError
from linstate.mixers._planned import PlannedMixer
from linstate.mixers.base import divide, head_count
from linstate.mixers.parts import HeadNorm, RMSNorm, positions
from linstate.ops.fused import Operands, Plan
from linstate.types import MOST_TOKENS, LayerState, Range, state_dtype


class RetNet(PlannedMixer):
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
        self.plan = Plan(
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

    def project(
        self, x: Tensor, state: LayerState, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Operands, LayerState]:
        projected = self.in_proj(x)  # q, k, v, z
        position, after = positions(state.get("position"), x, cu_seqlens)
        operands = Operands(
            rate=self.decay(x),
            norm=self.norm.weight,
            norm_bias=getattr(self.norm, "bias", None),
            z=projected[..., -self.sizes[3] :],
            position=position,
        )
        return projected, operands, {"position": after}

    def init_state(self, batch: int, *, device: torch.device | str | None = None) -> LayerState:
        matrix = self.zeros(batch, self.num_heads, self.k_dim, self.v_dim, device=device)
        return {"S": matrix, "position": torch.zeros(batch, dtype=torch.int64, device=matrix.device)}

    def ranges(self) -> dict[str, Range]:
        return {"position": (0, MOST_TOKENS)}

    def recurrence_flops(self, tokens: int) -> int:
        return tokens * self.num_heads * self.k_dim * self.v_dim * 5
