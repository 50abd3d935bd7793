"""What the mixers of softmax attention share: projections, rotary embedding, norms of q and k, and the cache.

    o_t = sum_s softmax_s(q_t . k_s / sqrt K) v_s      over s <= t, with a window W over t - W < s <= t
    q = rotate(norm(W_q x), t)      k = rotate(norm(W_k x), t)      v = W_v x
    y = W_o o, with an output gate W_o (o * sigmoid(W_z x))

``window`` None is full attention, whose cache grows by one place for each token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linstate.errors import ConfigError
from linstate.mixers.base import Mixer, divide, head_count
from linstate.mixers.parts import RMSNorm, heads, positions
from linstate.ops import softmax_attention
from linstate.ops.features import rotate
from linstate.ops.native import attend as native_attend
from linstate.ops.softmax_attention import KVCache
from linstate.types import MOST_TOKENS, LayerState, Range

QK_NORMS = (False, True, "zero_centred", "whole")
"""None; for each head; for each head, with its weight kept as its distance from one; over all heads at once (OLMo)."""

BIASES = (False, True, "out")
"""None; of both projections; of the last one only (Gemma's recurrent models)."""


class SoftmaxMixer(Mixer):
    """See the module. State: ``k, v [B, S, Hk, K]``, ``length [B]`` and ``position [B]`` int64."""

    recurrence = "softmax_attention"
    composition = "refused"  # keys carry absolute positions

    def __init__(
        self,
        d_model: int,
        window: int | None,
        num_heads: int | None,
        num_kv_heads: int | None,
        head_dim: int,
        rotary_base: float | None,
        rotary_dim: int | None,
        qk_norm: bool | str,
        output_gate: bool,
        norm_eps: float,
        bias: bool | str = False,
        scale: float | None = None,
    ) -> None:
        super().__init__(d_model)
        if window is not None and window < 1:
            raise ConfigError(f"window must be at least 1 token, got {window}")
        self.window, self.head_dim = window, head_dim
        self.hq = head_count(num_heads, d_model, head_dim)
        self.hk = self.hq if num_kv_heads is None else num_kv_heads
        divide(self.hq, self.hk, "num_heads into num_kv_heads groups")
        self.rotary_base, self.rotary_dim = rotary_base, head_dim if rotary_dim is None else rotary_dim
        if rotary_base is not None and (self.rotary_dim % 2 or not 0 < self.rotary_dim <= head_dim):
            raise ConfigError(
                f"rotary_dim must be even and at most head_dim {head_dim}, got {self.rotary_dim}"
            )
        inner, keys = self.hq * head_dim, self.hk * head_dim
        self.sizes = [inner, keys, keys, inner if output_gate else 0]  # q, k, v, z
        self.in_proj = nn.Linear(d_model, sum(self.sizes), bias=bias is True)
        if bias not in BIASES:
            raise ConfigError(f"bias must be one of {', '.join(map(repr, BIASES))}, got {bias!r}")
        if qk_norm not in QK_NORMS:
            raise ConfigError(f"qk_norm must be one of {', '.join(map(repr, QK_NORMS))}, got {qk_norm!r}")
        self.norms_whole, self.scale = qk_norm == "whole", scale
        sizes = (inner, keys) if self.norms_whole else (head_dim, head_dim)
        self.q_norm, self.k_norm = (
            RMSNorm(size, norm_eps, centred=qk_norm == "zero_centred") if qk_norm else nn.Identity()
            for size in sizes
        )
        self.out_proj = nn.Linear(inner, d_model, bias=bool(bias))

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        shared: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, LayerState]:
        return self.attend(self.in_proj(x), state, cu_seqlens)

    @property
    def norm_weights(self) -> tuple[Tensor | None, Tensor | None] | None:
        """Of the heads of q and k, as the native step reads them; None: it has no norm like that."""
        if self.norms_whole:
            return None
        return getattr(self.q_norm, "weight", None), getattr(self.k_norm, "weight", None)

    def attend(
        self, projected: Tensor, state: LayerState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        """What :meth:`forward` does behind the first projection: q, k, v and z side by side in ``projected [B, T, *]``."""
        q, k, v, z = projected.split(self.sizes, dim=-1)
        held = None if not state else (state["k"], state["v"], state["length"], state["position"])
        norms = self.norm_weights
        if (
            norms is not None
            and self.window is None
            and native_attend.serves(projected, held, cu_seqlens, *norms)
        ):
            o, held = native_attend.step(
                q,
                k,
                v,
                z if self.sizes[3] else None,
                held,
                (self.hq, self.hk),
                scale=self.head_dim**-0.5 if self.scale is None else self.scale,
                norms=norms,
                eps=getattr(self.q_norm, "eps", 0.0),
                weight_plus=float(getattr(self.q_norm, "centred", False)),
                turned=0 if self.rotary_base is None else self.rotary_dim,
                rotary_base=self.rotary_base or 1.0,
            )
            return self.out_proj(o), dict(zip(("k", "v", "length", "position"), held, strict=True))
        if self.norms_whole:
            q, k = heads(self.q_norm(q), self.hq), heads(self.k_norm(k), self.hk)  # [B, T, H, K]
        else:
            q, k = self.q_norm(heads(q, self.hq)), self.k_norm(heads(k, self.hk))
        v = heads(v, self.hk)
        position, after = positions(state["position"] if state else None, projected, cu_seqlens)
        if self.rotary_base is not None:
            q, k = rotate(position, q, k, base=self.rotary_base, size=self.rotary_dim)
        cache = KVCache(state["k"], state["v"], state["length"]) if state else None
        o, cache = softmax_attention(
            q, k, v, scale=self.scale, window=self.window, initial_state=cache, cu_seqlens=cu_seqlens
        )
        o = o.flatten(-2)  # [B, T, H * K]
        return self.out_proj(o * z.sigmoid() if self.sizes[3] else o), {**cache._asdict(), "position": after}

    def init_state(self, batch: int, *, device: torch.device | str | None = None) -> LayerState:
        like = torch.empty(0, dtype=self.in_proj.weight.dtype, device=device or self.device)
        cache = KVCache.empty(batch, self.hk, self.head_dim, self.head_dim, window=self.window, like=like)
        return {**cache._asdict(), "position": torch.zeros_like(cache.length)}

    def state_bytes(self, tokens: int) -> int:
        places = 0 if self.window is not None else tokens
        return (
            super().state_bytes(tokens)
            + 2 * places * self.hk * self.head_dim * self.in_proj.weight.element_size()
        )

    def caches(self) -> dict[str, int | None]:
        return dict.fromkeys(("k", "v"), None if self.window is None else self.window - 1)

    def ranges(self) -> dict[str, Range]:
        return {"length": (0, "k"), "position": (0, MOST_TOKENS)}

    def recurrence_flops(self, tokens: int) -> int:
        full = tokens if self.window is None else min(tokens, self.window)  # tokens that see all before them
        seen = full * (full + 1) // 2 + (tokens - full) * full
        return seen * self.hq * self.head_dim * 4
