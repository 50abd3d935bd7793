"""Memory of states: the delta rule begins anew with every segment, and the states of past segments stay to be read.

    S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T      S = 0 before the first token of a segment
    r_i = u_t . mean of k over segment i      R_t = the top_k past segments of the largest r_i
    o_t = gamma_0 S_t^T q_t + sum_{i in R_t} gamma_i S_i^T q_t      gamma = softmax over the own segment and R_t
    q, k = l2norm(silu(conv(W x)))      v = silu(conv(W x))      u = W_u x      beta = sigmoid(W_b x)
    y = W_o rms_norm(o)

S_i is the state at the end of segment i; for the token's own segment the mean is over its keys so far. The paper's M
is S, its caches are kept of all segments and so grow with the text; here the ``slots`` newest stay, and memory is
constant. This is its sparse selective caching with a softmax, every segment compressed by itself, over the delta rule.

Source: Behrouz 2026, Memory Caching: RNNs with Growing Memory, arXiv 2602.24281, the part on sparse selective caching.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linstate.errors import ConfigError
from linstate.mixers.base import Mixer, head_count
from linstate.mixers.parts import RMSNorm, ShortConvolution, heads
from linstate.ops import delta_rule
from linstate.ops.features import l2_norm
from linstate.ops.slots import Slots
from linstate.types import LayerState, Range, state_dtype


class MemoryOfStates(Mixer):
    """See the module. State: ``S [B, H, K, K]`` and ``keys [B, H, K]``, the sum of k, of the unfinished segment, its tokens
    ``count [B]``; ``states [B, M, H, K, K]`` and ``means [B, M, H, K]`` of the M newest segments, the newest last,
    ``filled [B]`` of them in use; ``conv [B, W - 1, 3 H K]``."""

    recurrence = "delta_rule"
    equation = (
        "o_t = c_0 S_t^T q + sum_{i in top-k} c_i S_i^T q, S_t = (I - b k k^T) S_{t-1} + b k v^T in a segment"
    )
    source = "Behrouz 2026, arXiv 2602.24281"
    composition = "refused"  # states in slots follow each other, they do not add up

    def __init__(
        self,
        d_model: int,
        num_heads: int | None = None,
        head_dim: int = 64,
        segment: int = 64,
        slots: int = 8,
        top_k: int = 2,
        conv_width: int = 4,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__(d_model)
        if segment < 1 or not 1 <= top_k <= slots:
            raise ConfigError(
                f"segment must be at least 1 token and top_k lie in [1, slots], got {segment}, {top_k} and {slots} slots"
            )
        self.num_heads, self.head_dim = head_count(num_heads, d_model, head_dim), head_dim
        self.segment, self.slots, self.top_k = segment, slots, top_k
        inner = self.num_heads * head_dim
        self.sizes = [3 * inner, inner, self.num_heads]  # q k v, u, beta
        self.in_proj = nn.Linear(d_model, sum(self.sizes), bias=False)
        self.conv = ShortConvolution(3 * inner, conv_width)
        self.norm = RMSNorm(head_dim, norm_eps)
        self.out_proj = nn.Linear(inner, d_model, bias=False)

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        shared: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, LayerState]:
        qkv, u, beta = self.in_proj(x).split(self.sizes, dim=-1)
        qkv, tail = self.conv(qkv, state["conv"] if state else None, cu_seqlens)
        q, k, v = (heads(part, self.num_heads) for part in qkv.chunk(3, dim=-1))
        slots = Slots(x, state["count"] if state else None, self.segment, cu_seqlens)
        before = state or self.init_state(len(slots.count), device=x.device)
        q, k, v, u, beta = (
            slots.fill(part.to(state_dtype(x)))[:, :, slots.used]
            for part in (l2_norm(q), l2_norm(k), v, heads(u, self.num_heads), beta.sigmoid())
        )  # [rows, N, C, H, K or V], beta [rows, N, C, H]; an empty slot changes nothing: its beta is zero
        own, ends = self.own_segment(q, k, v, beta, before["S"])
        sums = k.cumsum(2)  # [rows, N, C, H, K]
        sums[:, 0] += before["keys"][:, None]
        place = torch.arange(slots.used.start + 1, slots.used.stop + 1, device=x.device)
        scores = (u * sums).sum(-1, keepdim=True) / place[:, None, None]  # [rows, N, C, H, 1]
        last = sums[:, :, -1] if k.shape[2] else before["keys"][:, None]  # [rows, N, H, K]
        states = torch.cat([before["states"], ends], 1)  # [rows, M + N, H, K, V]
        means = torch.cat([before["means"], last / self.segment], 1)
        weights = self.choose(u, scores, means, before["filled"])  # [rows, N, C, H, 1 + M]
        o = weights[..., :1] * own
        for i in range(self.slots):
            past = states[
                :, i : i + slots.segments
            ]  # [rows, N, H, K, V]: the i-th of those that a segment sees
            o = o + weights[..., i + 1, None] * (q.transpose(2, 3) @ past).transpose(2, 3)
        y = self.out_proj(self.norm(slots.take(o).to(x.dtype)).flatten(-2))
        rows = torch.arange(len(slots.count), device=x.device)
        newest = rows[:, None], slots.last[:, None] + torch.arange(self.slots, device=x.device)
        unfinished = rows, slots.last.clamp(max=slots.segments - 1)
        going = (slots.after > 0)[:, None, None]
        return y, {
            "S": torch.where(going[..., None], ends[unfinished], torch.zeros_like(ends[:, 0])),
            "keys": torch.where(going, last[unfinished], torch.zeros_like(last[:, 0])),
            "count": slots.after,
            "states": states[newest],
            "means": means[newest],
            "filled": (before["filled"] + slots.last).clamp(max=self.slots),
            "conv": tail,
        }

    def own_segment(
        self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, matrix: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What each segment by itself answers, and its state at the end; the first goes on from ``matrix``."""
        rows = q.shape[:2]
        begin = torch.cat([matrix[:, None], matrix.new_zeros((rows[0], rows[1] - 1, *matrix.shape[1:]))], 1)
        flat = (part.flatten(0, 1) for part in (q, k, v, beta))
        o, ends = delta_rule(*flat, scale=1.0, initial_state=begin.flatten(0, 1))
        return o.unflatten(0, rows), ends.unflatten(0, rows)

    def choose(self, u: Tensor, own: Tensor, means: Tensor, filled: Tensor) -> Tensor:
        """gamma ``[rows, N, C, H, 1 + M]``: of the own segment, then of the M before it; zero but for the top_k."""
        segments = u.shape[1]
        seen = means.unfold(1, self.slots, 1)[:, :segments]  # [rows, N, H, K, M]
        scores = (u.transpose(2, 3) @ seen).transpose(2, 3)  # [rows, N, C, H, M]
        number = torch.arange(segments, device=u.device)[:, None] + torch.arange(self.slots, device=u.device)
        empty = number < (self.slots - filled)[:, None, None]  # [rows, N, M]
        scores = scores.masked_fill(empty[:, :, None, None], float("-inf"))
        best = scores.topk(self.top_k, dim=-1).indices
        keep = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)
        return torch.cat([own, scores.masked_fill(~keep, float("-inf"))], -1).softmax(-1)

    def init_state(self, batch: int, *, device: torch.device | str | None = None) -> LayerState:
        size = (self.num_heads, self.head_dim)
        matrix = self.zeros(batch, *size, self.head_dim, device=device)
        count = torch.zeros(batch, dtype=torch.int64, device=matrix.device)
        return {
            "S": matrix,
            "keys": self.zeros(batch, *size, device=device),
            "count": count,
            "states": self.zeros(batch, self.slots, *size, self.head_dim, device=device),
            "means": self.zeros(batch, self.slots, *size, device=device),
            "filled": torch.zeros_like(count),
            "conv": self.conv.init_state(batch, device or self.device),
        }

    def ranges(self) -> dict[str, Range]:
        return {"count": (0, self.segment - 1), "filled": (0, self.slots)}

    def recurrence_flops(self, tokens: int) -> int:
        """Per entry of a state: delta rule 6, reading every slot 2; and the scores."""
        entries = self.head_dim * (self.head_dim * (6 + 2 * self.slots) + 2 * (self.slots + 1))
        return tokens * self.num_heads * entries
