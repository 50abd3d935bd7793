"""Multi-head latent attention (MLA): softmax attention whose cache holds one latent per token instead of keys and values.

    c_s = rms_norm(W_c x_s) [R]      r_s = rotate(W_r x_s, s) [Kr], one for all heads
    k_s = [W_k c_s, r_s]      v_s = W_v c_s      q_t = [W_q x_t, rotate(W_qr x_t, t)]
    o_t = sum_{s <= t} softmax_s(q_t . k_s / sqrt(K + Kr)) v_s      y = W_o o

The paper's c^KV is c, its k^R is r, its W^DKV, W^UK, W^UV are W_c, W_k, W_v, its d_c is R (``kv_rank``, 4 K unless given),
its d_h^R is Kr (``rotary_dim``, K / 2 unless given). With ``q_rank`` the queries come from a latent too (its c^Q).
``rotary_base`` None: no positions at all (NoPE), r is a part of the keys that all heads share (Kimi Linear).

A piece of text is read with k and v made from the latents. One token is read in the absorbed form: since q . W_k c is
(W_k^T q) . c, all heads attend to the latents as they lie in the cache, and W_v is applied to what they found.

Source: DeepSeek-AI 2024, DeepSeek-V2, arXiv 2405.04434, section 2.1; without positions: Kimi Linear, arXiv 2510.26692.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linstate.errors import ConfigError
from linstate.mixers.base import Mixer, head_count
from linstate.mixers.parts import RMSNorm, heads, plain_linear, positions
from linstate.ops import softmax_attention
from linstate.ops.features import rotate
from linstate.ops.softmax_attention import KVCache, append
from linstate.types import MOST_TOKENS, LayerState, Range


class MLA(Mixer):
    """See the module. State: ``latent [B, S, R + Kr]`` of the S tokens before, ``length [B]`` and ``position [B]`` int64."""

    recurrence = "softmax_attention"
    equation = "o_t = W_v sum_{s <= t} softmax_s(W_k^T q_t . c_s + q_t . r_s) c_s"
    source = "DeepSeek-V2 2024, arXiv 2405.04434"
    composition = "refused"  # keys carry absolute positions

    def __init__(
        self,
        d_model: int,
        num_heads: int | None = None,
        head_dim: int = 64,
        v_head_dim: int | None = None,
        kv_rank: int | None = None,
        q_rank: int | None = None,
        rotary_dim: int | None = None,
        rotary_base: float | None = 10000.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__(d_model)
        self.num_heads, self.k_dim = head_count(num_heads, d_model, head_dim), head_dim
        self.v_dim = head_dim if v_head_dim is None else v_head_dim
        self.rank = 4 * head_dim if kv_rank is None else kv_rank
        self.rotary_dim = head_dim // 2 if rotary_dim is None else rotary_dim
        self.rotary_base, self.scale = rotary_base, (head_dim + self.rotary_dim) ** -0.5
        if rotary_base is not None and (self.rotary_dim % 2 or self.rotary_dim < 2):
            raise ConfigError(f"rotary_dim must be even and positive, got {self.rotary_dim}")
        queries = self.num_heads * (head_dim + self.rotary_dim)
        self.sizes = [queries if q_rank is None else q_rank, self.rank, self.rotary_dim]  # q, c, r
        self.in_proj = nn.Linear(d_model, sum(self.sizes), bias=False)
        self.q_up = (
            nn.Identity()
            if q_rank is None
            else nn.Sequential(RMSNorm(q_rank, norm_eps), nn.Linear(q_rank, queries, bias=False))
        )
        self.norm = RMSNorm(self.rank, norm_eps)
        self.kv_up = nn.Linear(self.rank, self.num_heads * (head_dim + self.v_dim), bias=False)
        self.kv_up.keep_plain = True  # type: ignore[assignment]  # decoding multiplies with its halves
        self.out_proj = nn.Linear(self.num_heads * self.v_dim, d_model, bias=False)

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        shared: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, LayerState]:
        if state is None:
            state = self.init_state(x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1)
        q, c, r = self.in_proj(x).split(self.sizes, dim=-1)
        q, r = heads(self.q_up(q), self.num_heads), r[:, :, None]  # [B, T, H, K + Kr], [B, T, 1, Kr]
        position, after = positions(state["position"], x, cu_seqlens)
        if self.rotary_base is not None:
            q, turned = q.split([self.k_dim, self.rotary_dim], dim=-1)
            turned, r = rotate(position, turned, r, base=self.rotary_base)
            q = torch.cat([q, turned], dim=-1)
        new = torch.cat([self.norm(c), r[:, :, 0]], dim=-1)  # [B, T, R + Kr]
        attend = self._absorbed if x.shape[1] == 1 and plain_linear(self.kv_up) else self._expanded
        o = attend(q, new, state, cu_seqlens)  # [B, T, H, V]
        latent, length = append(state["latent"], state["length"], new, cu_seqlens)
        return self.out_proj(o.flatten(-2)), {"latent": latent, "length": length, "position": after}

    def _expanded(self, q: Tensor, new: Tensor, state: LayerState, cu_seqlens: Tensor | None) -> Tensor:
        """Keys and values of every head, made from the latents: fewest products for many queries."""
        (k, v), before = self._keys_and_values(new), self._keys_and_values(state["latent"])
        cache = KVCache(*before, state["length"])
        return softmax_attention(q, k, v, scale=self.scale, initial_state=cache, cu_seqlens=cu_seqlens)[0]

    def _keys_and_values(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """``latent [B, S, R + Kr]`` -> k ``[B, S, H, K + Kr]``, v ``[B, S, H, V]``."""
        c, r = latent.split([self.rank, self.rotary_dim], dim=-1)
        k, v = heads(self.kv_up(c), self.num_heads).split([self.k_dim, self.v_dim], dim=-1)
        return torch.cat([k, r[:, :, None].expand(-1, -1, self.num_heads, -1)], dim=-1), v

    def _absorbed(self, q: Tensor, new: Tensor, state: LayerState, cu_seqlens: Tensor | None) -> Tensor:
        """All heads attend to the latents themselves, as heads of one group: the cache is read once."""
        weight = self.kv_up.weight.unflatten(0, (self.num_heads, -1))  # [H, K + V, R]
        up_k, up_v = weight.split([self.k_dim, self.v_dim], dim=1)
        q, turned = q.split([self.k_dim, self.rotary_dim], dim=-1)
        q = torch.cat([torch.einsum("bthk,hkr->bthr", q, up_k), turned], dim=-1)  # [B, T, H, R + Kr]
        k, before = new[:, :, None], state["latent"][:, :, None]  # [B, T, 1, R + Kr]
        cache = KVCache(before, before[..., : self.rank], state["length"])
        o, _ = softmax_attention(
            q, k, k[..., : self.rank], scale=self.scale, initial_state=cache, cu_seqlens=cu_seqlens
        )
        return torch.einsum("bthr,hvr->bthv", o, up_v)

    def init_state(self, batch: int, *, device: torch.device | str | None = None) -> LayerState:
        latent = self.in_proj.weight.new_zeros(
            batch, 0, self.rank + self.rotary_dim, device=device or self.device
        )
        length = torch.zeros(batch, dtype=torch.int64, device=latent.device)
        return {"latent": latent, "length": length, "position": torch.zeros_like(length)}

    def state_bytes(self, tokens: int) -> int:
        place = (self.rank + self.rotary_dim) * self.in_proj.weight.element_size()
        return super().state_bytes(tokens) + tokens * place

    def ranges(self) -> dict[str, Range]:
        return {"length": (0, "latent"), "position": (0, MOST_TOKENS)}

    def recurrence_flops(self, tokens: int) -> int:
        seen = tokens * (tokens + 1) // 2
        return seen * self.num_heads * (2 * self.rank + self.rotary_dim) * 2
