"""RWKV-7 "Goose", its time mix: the delta rule with a key to remove, a key to write and a rate, all per channel.

    x_i = lerp(x_t, x_{t-1}, mu_i),  i in r, w, k, v, a, g
    S_t = (diag(exp g_t) - (a_t * kappa_t) kappa_t^T) S_{t-1} + k_t v_t^T      o_t = S_t^T r_t
    g = -exp(-1/2) sigmoid(lora_w(x_w))      a = sigmoid(lora_a(x_a))
    kappa = l2norm(k * k_k)      k = k (1 + (a - 1) k_a)      k = W_k x_k, r = W_r x_r
    v = W_v x_v in the first layer, then lerp(W_v x_v, v of the first layer, sigmoid(lora_v(x_v)))
    y = W_o ((group_norm(o) + (r . (k * r_k)) v) * lora_g(x_g))

The paper's w_t is ``exp(g_t)``, its iclr is a, its removal key kappa (normalised), its replacement key k; its
state ``wkv`` is the transpose of ours. lora_w has a tanh inside, lora_g a sigmoid and no bias.

Source: Peng 2025, RWKV-7 "Goose" with Expressive Dynamic State Evolution, arXiv 2503.14456, section 4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from linstate.errors import ArgumentError
from linstate.mixers._rwkv import TimeMix
from linstate.mixers.base import ALONE, Place
from linstate.mixers.parts import LowRank, heads, side_by_side, token_shift
from linstate.ops import dplr
from linstate.ops.features import l2_norm
from linstate.ops.native import rwkv as native_rwkv
from linstate.types import LayerState, state_dtype


class RWKV7(TimeMix):
    """See the module. State: ``S [B, H, K, K]``, ``shift [B, 1, D]``.

    ``shared["v_first"]`` holds the values of the first RWKV-7 layer of this forward pass; that layer writes
    it, the others read it, whatever stands between them.
    """

    recurrence = "dplr"
    equation = "S_t = (diag(exp g) - (a * kappa) kappa^T) S_{t-1} + k v^T"
    source = "Peng 2025, arXiv 2503.14456"
    feed_forward = "rwkv7_channel_mix"

    def __init__(
        self,
        d_model: int,
        num_heads: int | None = None,
        head_dim: int = 64,
        decay_rank: int | None = None,
        rate_rank: int | None = None,
        value_rank: int | None = None,
        gate_rank: int | None = None,
        norm_eps: float | None = None,
        *,
        place: Place = ALONE,
    ) -> None:
        super().__init__(d_model, num_heads, head_dim, norm_eps)
        self.first, inner = place.first, self.inner

        def rank(given: int | None, factor: float) -> int:
            return max(32, round(factor * d_model**0.5 / 32) * 32) if given is None else given

        self.mix = nn.Parameter(torch.empty(6, d_model))  # r, w, k, v, a, g
        self.decay_lora = LowRank(d_model, inner, rank(decay_rank, 2.5), torch.tanh, bias=True)
        self.rate_lora = LowRank(d_model, inner, rank(rate_rank, 2.5), bias=True)
        self.value_lora = None if self.first else LowRank(d_model, inner, rank(value_rank, 1.7), bias=True)
        self.gate_lora = LowRank(d_model, inner, rank(gate_rank, 5.0), torch.sigmoid)
        self.k_k = nn.Parameter(torch.empty(inner))
        self.k_a = nn.Parameter(torch.full((inner,), 1.02))
        self.r_k = nn.Parameter(torch.full((self.num_heads, head_dim), -0.04))
        self.reset(place)

    @torch.no_grad()
    def reset(self, place: Place) -> None:
        """The paper's initial values, which depend on depth and channel (appendix on parameter initialisation)."""
        depth = place.layer / max(1, place.layers - 1)  # 0 to 1
        rest = 1 - place.layer / place.layers  # 1 to almost 0
        channel = torch.arange(self.d_model) / self.d_model
        powers = torch.tensor([0.2, 0.9, 0.7, 0.7, 0.9, 0.2])  # r, w, k, v, a, g
        self.mix.copy_(1 - channel ** (powers[:, None] * rest))
        line = torch.linspace(0, 1, self.inner, device=channel.device)
        zigzag = torch.linspace(-1, 1, self.head_dim, device=channel.device).repeat(self.num_heads)
        zigzag = zigzag * zigzag.abs()
        self.decay_lora.widen.bias.copy_(6 * line ** (1 + depth**0.3) - 5.5 + 2.5 * zigzag)
        self.rate_lora.widen.bias.copy_(-0.19 + 0.3 * zigzag + 0.4 * (line - 0.5))
        if self.value_lora is not None:
            self.value_lora.widen.bias.copy_(0.73 - 0.4 * (line - 0.5))
        self.k_k.copy_(0.71 - 0.1 * (line - 0.5))
        self.norm.weight.fill_(((place.layer + 1) / place.layers) ** 0.7)
        bound = 0.5 * self.d_model**-0.5
        for projection, size in ((self.r_proj, bound), (self.k_proj, bound / 10), (self.v_proj, bound)):
            nn.init.uniform_(projection.weight, -size, size)
            projection.keep_init = True  # type: ignore[assignment]
        for lora in (self.decay_lora, self.rate_lora, self.value_lora, self.gate_lora):
            if lora is not None:
                lora.reset()

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        shared: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, LayerState]:
        state = state or {}
        if native_rwkv.serves(self, x, state.get("S"), cu_seqlens):
            return self._between(x, state, cu_seqlens, shared)
        before, last = token_shift(x, state.get("shift"), cu_seqlens)
        r, w, k, v, a, g = torch.lerp(x[..., None, :], before[..., None, :], self.mix).unbind(
            -2
        )  # [B, T, D] each
        r, k = self.r_proj(r), self.k_proj(k)  # [B, T, H * K] each
        v, mixed_in = self._values(v, shared)
        if mixed_in is not None:
            v = torch.lerp(v, mixed_in[1], mixed_in[0].sigmoid())
        a = self.rate_lora(a).sigmoid()
        decay = -math.exp(-0.5) * self.decay_lora(w).to(state_dtype(x)).sigmoid()
        kappa = l2_norm(heads(k * self.k_k, self.num_heads), eps=1e-12)
        r, k, v, a, decay = (heads(t, self.num_heads) for t in (r, k * (1 + (a - 1) * self.k_a), v, a, decay))
        o, matrix = dplr(
            r, k, v, -a * kappa, kappa, decay, scale=1.0, initial_state=state.get("S"), cu_seqlens=cu_seqlens
        )
        bonus = (r * k * self.r_k).sum(-1, keepdim=True) * v  # [B, T, H, V]
        y = (self.norm(o) + bonus.flatten(-2)) * self.gate_lora(g)
        return self.out_proj(y), {"S": matrix, "shift": last}

    def _values(
        self, x: Tensor, shared: dict[str, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """v, and but for the first layer how much of the first layer's v comes in, before its sigmoid, and that v."""
        v: Tensor = self.v_proj(x)
        low = () if self.value_lora is None else (self.value_lora(x),)
        return v, self._first_value(v, shared, *low)

    @staticmethod
    def _first_value(
        v: Tensor, shared: dict[str, Tensor] | None, mixed_in: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """How much of the first layer's v comes in, before its sigmoid, and that v; the first layer hands its own on."""
        if mixed_in is None:
            if shared is not None:
                shared["v_first"] = v
            return None
        if shared is None or "v_first" not in shared:
            raise ArgumentError(
                "rwkv7: shared must hold 'v_first', the values of the model's first rwkv7 layer"
            )
        return mixed_in, shared["v_first"]

    def _between(
        self, x: Tensor, state: LayerState, cu_seqlens: Tensor | None, shared: dict[str, Tensor] | None
    ) -> tuple[Tensor, LayerState]:
        """With one call before the projections and one behind them."""
        (r, w, k, v, a, g), last = native_rwkv.shift(
            x, state.get("shift"), self.mix, cu_seqlens=cu_seqlens
        )  # [B, T, D] each
        of_v = v
        r, k, v = self.r_proj(r), self.k_proj(k), self.v_proj(v)  # [B, T, H * K] each
        low = [(self.decay_lora, w), (self.rate_lora, a), (self.gate_lora, g)]
        if self.value_lora is not None:
            low.append((self.value_lora, of_v))
        decay, rate, gate, *value = side_by_side(*low)
        y, matrix = native_rwkv.time_mix(
            r,
            k,
            v,
            decay,
            rate,
            self._first_value(v, shared, *value),
            gate,
            self.k_k,
            self.k_a,
            self.r_k,
            self.norm.weight,
            self.norm.bias,
            eps=self.norm.eps,
            matrix=state.get("S"),
            cu_seqlens=cu_seqlens,
        )
        return self.out_proj(y), {"S": matrix, "shift": last}

    def recurrence_flops(self, tokens: int) -> int:
        return tokens * self.num_heads * self.head_dim**2 * 9
