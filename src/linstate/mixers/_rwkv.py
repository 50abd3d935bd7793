"""What RWKV's time mixes share: projections, norm and state; and all of RWKV-5 and RWKV-6 but shift and decay.

    o_t = (S_{t-1} + diag(u) k_t v_t^T)^T r_t      S_t = diag(exp g_t) S_{t-1} + k_t v_t^T
    r = W_r x_r      k = W_k x_k      v = W_v x_v      y = W_o (group_norm(o) * silu(W_g x_g))

``x_i`` lies between x_t and x_{t-1}, a rate for each channel and i. Initial values are those of the authors' code: they
depend on depth and channel.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from linstate.mixers._planned import PlannedMixer
from linstate.mixers.base import Mixer, Place, head_count
from linstate.mixers.parts import HeadNorm, token_shift
from linstate.ops.fused import Operands, Plan
from linstate.types import LayerState


class TimeMix(Mixer):
    """What RWKV-5, RWKV-6 and RWKV-7 share. State: ``S [B, H, K, K]``, ``shift [B, 1, D]``."""

    def __init__(self, d_model: int, num_heads: int | None, head_dim: int, norm_eps: float | None) -> None:
        super().__init__(d_model)
        self.num_heads, self.head_dim = head_count(num_heads, d_model, head_dim), head_dim
        self.inner = self.num_heads * head_dim
        self.r_proj = nn.Linear(d_model, self.inner, bias=False)
        self.k_proj = nn.Linear(d_model, self.inner, bias=False)
        self.v_proj = nn.Linear(d_model, self.inner, bias=False)
        self.norm = HeadNorm(self.num_heads, head_dim, 1e-5 * head_dim if norm_eps is None else norm_eps)
        self.out_proj = nn.Linear(self.inner, d_model, bias=False)

    def init_state(self, batch: int, *, device: torch.device | str | None = None) -> LayerState:
        return {
            "S": self.zeros(batch, self.num_heads, self.head_dim, self.head_dim, device=device),
            "shift": self.zeros(batch, 1, self.d_model, device=device),
        }


class RWKVMixer(PlannedMixer, TimeMix):
    """RWKV-5 and RWKV-6: see the module."""

    recurrence = "linear_attention"
    feed_forward = "rwkv_channel_mix"

    def __init__(
        self,
        d_model: int,
        num_heads: int | None,
        head_dim: int,
        norm_eps: float | None,
        place: Place,
        mixed: int,
    ) -> None:
        super().__init__(d_model, num_heads, head_dim, norm_eps)
        depth = place.layer / max(1, place.layers - 1)  # 0 to 1
        channel = torch.arange(d_model) / d_model
        early = channel ** (1 - place.layer / place.layers)
        rates = torch.stack(
            [early**0.5, early, early + 0.3 * depth, early**0.5, early, early]
        )  # r, k, v, g, w, x
        self.mix = nn.Parameter(1 - rates[:mixed])
        line = torch.linspace(0, 1, self.inner, device=channel.device)
        self.decay = nn.Parameter(-6 + 5 * line ** (0.7 + 1.3 * depth))
        zigzag = ((torch.arange(self.inner) + 1) % 3 - 1) * 0.1
        self.bonus = nn.Parameter((depth * (1 - line) + zigzag).unflatten(0, (self.num_heads, head_dim)))
        self.gate_proj = nn.Linear(d_model, self.inner, bias=False)
        self.plan = Plan(
            recurrence="linear_attention",
            hk=self.num_heads,
            hv=self.num_heads,
            k=head_dim,
            v=head_dim,
            q_at=0,
            k_at=0,
            v_at=0,
            scale=1.0,
            norm_eps=self.norm.eps,
            decay="exponential",
            norm="centred",
            gate="silu",
        )

    @abstractmethod
    def mixed(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """x for r, k, v and the gate, ``[B, T, D]`` each, and what the token adds to :attr:`decay`, ``[B, T, H K]``."""

    def project(
        self, x: Tensor, state: LayerState, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Operands, LayerState]:
        before, last = token_shift(x, state.get("shift"), cu_seqlens)
        r, k, v, gate, added = self.mixed(x, before)
        operands = Operands(
            key=self.k_proj(k),
            value=self.v_proj(v),
            step=added,
            step_bias=self.decay,
            bonus=self.bonus,
            norm=self.norm.weight,
            norm_bias=self.norm.bias,
            z=self.gate_proj(gate),
        )
        return self.r_proj(r), operands, {"shift": last}

    def recurrence_flops(self, tokens: int) -> int:
        return tokens * self.num_heads * self.head_dim**2 * 5
