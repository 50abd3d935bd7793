"""Keyed window: softmax attention over the last W tokens in which a token is found by what stood before it.

    h_t = f_t h_{t-1} + i_t W_h x_t                        what the entry (a line, a record) has held so far
    c_t = [norm(conv(W x))_t, norm(h_t)]                   where token t stands: the last few tokens, and the entry
    o_t = sum_{t - W < s <= t} softmax_s((a * c^q_t) . c^k_{s-1}) W_v x_s
    y = W_o o

f_t and i_t are sigmoids, one number for each head: a newline can end an entry, a word can count more than a comma. A value is
stored under the place *before* it, so a query finds what followed where a place like this one stood: an induction head in one
layer. It is the exact memory of the last W tokens beside a recurrence that remembers what came before them; its state is of
constant size. With ``induction`` the layer begins with weights that do this before anything is learned.
With ``ahead`` a value also holds the token after it: W_v x_s + W_a x_{s+1}, stored one token later (the newest token alone is not
found yet). What is copied then knows whether it ends here: a full stop before a space ends a sentence, one before a letter is part of a name.

Source: this project. Induction heads: Olsson 2022, arXiv 2209.11895; begun with, not found by training: mimetic
initialisation, Trockman 2024, arXiv 2410.11135; windows beside recurrences: Arora 2024, arXiv 2402.18668.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linstate.errors import ConfigError
from linstate.mixers.base import Mixer, divide, head_count
from linstate.mixers.parts import RMSNorm, ShortConvolution, heads, token_shift
from linstate.ops import selective_scan, softmax_attention
from linstate.ops.softmax_attention import KVCache
from linstate.types import LayerState, Range

TAPS = (1.0, 0.8, 0.6)
"""What the last tokens count in a layer that begins as an induction head, the newest first."""
SHARPNESS = (3.5, 7.0)
"""What scores of tokens and of entries are multiplied by at first: 20 and 40 for equal places with K = 128."""

AFTER = 0.3
"""What the token after a value counts in it at first, beside 1 for the value itself."""


class KeyedWindow(Mixer):
    """See the module. State: ``k, v [B, W - 1, Hk, K]``, ``length [B]`` of them in use, ``conv``, ``h``, ``before [B, 1, Hk K]``;
    with ``ahead`` also ``waiting [B, 1, 2 Hk K]``, the newest token's place and value."""

    recurrence = "softmax_attention"
    equation = (
        "o_t = sum_{t-W < s <= t} softmax_s(c_t . c_{s-1}) v_s, c the last tokens and h_t = f h_{t-1} + i x_t"
    )
    source = "this project; Olsson 2022, arXiv 2209.11895"
    composition = (
        "approximate"  # keys of the later text would have begun with the entry that the first ends with
    )
    summed = ()
    joined = ("k", "v", "length")

    def __init__(
        self,
        d_model: int,
        window: int = 512,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int = 64,
        conv_width: int = 4,
        norm_eps: float = 1e-3,
        induction: bool = False,
        ahead: bool = False,
    ) -> None:
        super().__init__(d_model)
        if window < 1 or head_dim % 2:
            raise ConfigError(f"window must be at least 1 and head_dim even, got {window} and {head_dim}")
        self.window, self.head_dim, self.part, self.ahead = window, head_dim, head_dim // 2, ahead
        self.hq = head_count(num_heads, d_model, head_dim)
        self.hk = self.hq if num_kv_heads is None else num_kv_heads
        self.groups = divide(self.hq, self.hk, "num_heads into num_kv_heads groups")
        # q and k of the last tokens, the entry, v, and with ``ahead`` what v says of the token after it
        self.sizes = [self.hq * self.part, *[self.hk * self.part] * 2, *[self.hk * head_dim] * (1 + ahead)]
        self.in_proj = nn.Linear(d_model, sum(self.sizes), bias=False)
        self.entry_gates = nn.Linear(d_model, 2 * self.hk)
        nn.init.constant_(self.entry_gates.bias, 2.0)
        self.conv = ShortConvolution(sum(self.sizes[:2]), conv_width, activation=None)
        self.q_norm = RMSNorm(head_dim, norm_eps, groups=2)
        self.k_norm = RMSNorm(head_dim, norm_eps, groups=2)
        self.out_proj = nn.Linear(self.hq * head_dim, d_model, bias=False)
        if induction:
            self.begin_as_induction_heads()

    @torch.no_grad()
    def begin_as_induction_heads(self) -> None:
        """Set the weights so that equal places find each other from the first step on, and W_o undoes W_v."""
        rows = [heads(self.in_proj.weight.T, 1).new_empty(size, self.d_model) for size in self.sizes]
        key, entry, value, *after = (nn.init.normal_(row, std=self.d_model**-0.5) for row in rows[1:])
        query = key.unflatten(0, (self.hk, -1)).repeat_interleave(self.groups, 0).flatten(0, 1)
        if value.shape[0] <= self.d_model:
            nn.init.orthogonal_(value)
        after = [AFTER * row for row in after]
        self.in_proj.weight.copy_(torch.cat([query, key, entry, value, *after]))
        back = value.unflatten(0, (self.hk, -1)).repeat_interleave(self.groups, 0).flatten(0, 1)
        self.out_proj.weight.copy_(0.02 / self.groups * back.T)
        taps = self.conv.weight.zero_()  # the newest token is last
        used = TAPS[: self.conv.width]
        for channel in range(len(taps)):  # the same in every head
            distance = channel % self.part % len(used)
            taps[channel, -1 - distance] = used[distance]
        for part, sharpness in zip((slice(self.part), slice(self.part, None)), SHARPNESS, strict=True):
            self.q_norm.weight[part] = sharpness  # type: ignore[index]
        self.in_proj.keep_init = self.out_proj.keep_init = self.entry_gates.keep_init = True  # type: ignore[assignment]

    @torch.no_grad()
    def begin_entries(self, word: Tensor, newline: Tensor) -> None:
        """Have entries end at tokens that lie along ``newline [D]`` (unit), and words count that lie along ``word``."""
        self.entry_gates.weight.copy_(
            torch.cat([1.5 * word.expand(self.hk, -1), -3.0 * newline.expand(self.hk, -1)])
        )
        self.entry_gates.bias.copy_(torch.tensor([-2.5] * self.hk + [6.0] * self.hk))

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        shared: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, LayerState]:
        state = state or {}
        near, entry, v, *after = self.in_proj(x).split([sum(self.sizes[:2]), *self.sizes[2:]], dim=-1)
        near, tail = self.conv(near, state.get("conv"), cu_seqlens)
        near_q, near_k = near.split(self.sizes[:2], dim=-1)
        i, f = self.entry_gates(x).unflatten(-1, (2, self.hk, 1)).unbind(-3)  # [B, T, Hk, 1]
        held = heads(entry, self.hk) * i.sigmoid()  # [B, T, Hk, K / 2]
        decay = nn.functional.logsigmoid(f.float() if f.dtype != torch.float64 else f).expand_as(held)
        h, matrix = selective_scan(
            None, None, held, decay, initial_state=state.get("h"), cu_seqlens=cu_seqlens
        )
        q = torch.cat([heads(near_q, self.hq), h.repeat_interleave(self.groups, dim=2)], dim=-1)
        k = torch.cat([heads(near_k, self.hk), h], dim=-1)  # [B, T, Hk, K]
        late, before = token_shift(k.flatten(-2), state.get("before"), cu_seqlens)
        rest: LayerState = {"conv": tail, "h": matrix, "before": before}
        if self.ahead:
            pair, rest["waiting"] = token_shift(torch.cat([late, v], -1), state.get("waiting"), cu_seqlens)
            late, v = pair.chunk(2, dim=-1)
            v = v + after[0]
        cache = KVCache(state["k"], state["v"], state["length"]) if state else None
        o, cache = softmax_attention(
            self.q_norm(q),
            self.k_norm(heads(late, self.hk)),
            heads(v, self.hk),
            window=self.window,
            initial_state=cache,
            cu_seqlens=cu_seqlens,
        )
        return self.out_proj(o.flatten(-2)), {**cache._asdict(), **rest}

    def init_state(self, batch: int, *, device: torch.device | str | None = None) -> LayerState:
        like = torch.empty(0, dtype=self.in_proj.weight.dtype, device=device or self.device)
        cache = KVCache.empty(batch, self.hk, self.head_dim, self.head_dim, window=self.window, like=like)
        return {
            **cache._asdict(),
            "conv": self.conv.init_state(batch, like.device),
            "h": self.zeros(batch, self.hk, 1, self.part, device=device),
            "before": self.zeros(batch, 1, self.hk * self.head_dim, device=device),
            **(
                {"waiting": self.zeros(batch, 1, 2 * self.hk * self.head_dim, device=device)}
                if self.ahead
                else {}
            ),
        }

    @classmethod
    def add(cls, first: LayerState, later: LayerState) -> LayerState:
        """The later window behind the first: keys carry no positions. The rest is the newest tokens' and so the later's."""
        places, rows = later["k"].shape[1], []
        for row, used in enumerate(later["length"].tolist()):
            new = {name: later[name][row : row + 1, places - used :] for name in ("k", "v")}
            old = {name: first[name][row : row + 1, used:] for name in ("k", "v")}
            rows.append({name: torch.cat([old[name], new[name]], dim=1) for name in new})
        joined = {name: torch.cat([row[name] for row in rows]) for name in ("k", "v")}
        return {**later, **joined, "length": (first["length"] + later["length"]).clamp(max=places)}

    def caches(self) -> dict[str, int | None]:
        return dict.fromkeys(("k", "v"), self.window - 1)

    def ranges(self) -> dict[str, Range]:
        return {"length": (0, "k")}

    def recurrence_flops(self, tokens: int) -> int:
        full = min(tokens, self.window)  # tokens that see all before them
        seen = full * (full + 1) // 2 + (tokens - full) * full
        return seen * self.hq * self.head_dim * 4
