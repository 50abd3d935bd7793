"""Infini-attention: softmax attention inside a segment, and beside it a memory of everything before the segment.

    A_mem = S^T phi(q_t) / (z . phi(q_t))      phi(x) = elu(x) + 1
    A_dot = softmax attention of q_t over the keys of its own segment up to t, rotated
    o_t = sigmoid(beta) A_mem + (1 - sigmoid(beta)) A_dot      y = W_o o

and behind the last token of a segment of W tokens

    S = S + sum_s phi(k_s) (v_s - S^T phi(k_s) / (z . phi(k_s)))^T      z = z + sum_s phi(k_s)

with S and z before the segment on the right (``delta``), or without what S answers to k_s (the paper's "Linear").
The paper's M is S; beta is learned per head. The normaliser z is the last column of S, the keys of the memory are not
rotated (section 2.1), and the tokens of the unfinished segment are part of the state.

Source: Munkhdalai, Faruqui, Gopal 2024, Leave No Context Behind, arXiv 2404.07143, section 2.1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linstate.errors import ConfigError
from linstate.mixers.base import Mixer, divide, head_count
from linstate.mixers.parts import heads
from linstate.ops import softmax_attention
from linstate.ops.features import elu_plus_one, rotate
from linstate.ops.slots import Slots
from linstate.ops.softmax_attention import KVCache
from linstate.types import LayerState, Range, state_dtype


class InfiniAttention(Mixer):
    """See the module. State: ``S [B, H, K, V + 1]``; of the unfinished segment ``k, v [B, W - 1, H, K]``, ``count [B]``."""

    recurrence = "linear_attention"
    equation = "o_t = a S^T phi(q) / (z . phi(q)) + (1 - a) softmax in segment; S = S + phi(k) (v - S^T phi(k))^T per segment"
    source = "Munkhdalai 2024, arXiv 2404.07143"

    def __init__(
        self,
        d_model: int,
        window: int = 256,
        num_heads: int | None = None,
        head_dim: int = 64,
        delta: bool = True,
        rotary_base: float | None = 10000.0,
        eps: float = 1e-6,
    ) -> None:
        super().__init__(d_model)
        divide(head_dim, 2, "head_dim of rotated channels")
        if window < 1:
            raise ConfigError(f"window must be at least 1 token, got {window}")
        self.num_heads, self.head_dim = head_count(num_heads, d_model, head_dim), head_dim
        self.window, self.delta, self.rotary_base, self.eps = window, delta, rotary_base, eps
        self.in_proj = nn.Linear(d_model, 3 * self.num_heads * head_dim, bias=False)
        self.beta = nn.Parameter(torch.zeros(self.num_heads))
        self.out_proj = nn.Linear(self.num_heads * head_dim, d_model, bias=False)

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        shared: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, LayerState]:
        state = state or {}
        wide = state_dtype(x)
        slots = Slots(x, state.get("count"), self.window, cu_seqlens)
        q, k, v = (heads(part, self.num_heads).to(wide) for part in self.in_proj(x).chunk(3, dim=-1))
        q, k, v = slots.fill(q), slots.fill(k, state.get("k")), slots.fill(v, state.get("v"))
        o, matrix = self.remember(q, k, v, slots, state.get("S"))  # [rows, N, W, H, V]
        mix = self.beta.to(wide).sigmoid()[:, None]  # [H, 1]
        o = slots.take(mix * o + (1 - mix) * self.attend(q, k, v, slots)).to(x.dtype)
        after = {"S": matrix, "k": slots.pending(k), "v": slots.pending(v), "count": slots.after}
        return self.out_proj(o.flatten(-2)), after

    def attend(self, q: Tensor, k: Tensor, v: Tensor, slots: Slots) -> Tensor:
        """A_dot of the used slots of ``[rows, N, W, H, K]``: every segment by itself, positions those in the segment."""
        rows = q.shape[:2]
        q, k, v = (part.flatten(0, 1) for part in (q, k, v))  # [rows * N, W, H, K]
        if self.rotary_base is not None:
            place = torch.arange(self.window, device=q.device)[None]
            q, k = rotate(place, q, k, base=self.rotary_base)
        past, now = slice(0, slots.used.start), slots.used
        length = torch.full((q.shape[0],), past.stop, device=q.device)
        cache = KVCache(k[:, past], v[:, past], length)
        o, _ = softmax_attention(q[:, now], k[:, now], v[:, now], initial_state=cache)
        return o.unflatten(0, rows)

    def remember(
        self, q: Tensor, k: Tensor, v: Tensor, slots: Slots, matrix: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """A_mem of the used slots, and S after the segments that are complete."""
        q, k = elu_plus_one(q[:, :, slots.used]).transpose(2, 3), elu_plus_one(k).transpose(2, 3)
        v = F.pad(v, (0, 1), value=1.0).transpose(2, 3)  # [rows, N, H, W, V + 1]
        if matrix is None:
            matrix = v.new_zeros((v.shape[0], self.num_heads, self.head_dim, self.head_dim + 1))
        answers = []
        for n, full in enumerate(slots.complete.unbind(1)):
            answers.append(self.read(matrix, q[:, n]))
            if n < slots.done:
                known = F.pad(self.read(matrix, k[:, n]), (0, 1)) if self.delta else 0.0
                written = matrix + k[:, n].transpose(-1, -2) @ (v[:, n] - known)
                matrix = torch.where(full[:, None, None, None], written, matrix)
        return torch.stack(answers, 1).transpose(2, 3), matrix

    def read(self, matrix: Tensor, keys: Tensor) -> Tensor:
        """What the memory answers to ``keys [B, H, W, K]``, features already: ``[B, H, W, V]``; zero if it is empty."""
        found = keys @ matrix
        return found[..., :-1] / (found[..., -1:] + self.eps)

    def init_state(self, batch: int, *, device: torch.device | str | None = None) -> LayerState:
        size = (self.num_heads, self.head_dim)
        matrix = self.zeros(batch, *size, self.head_dim + 1, device=device)
        waiting = self.zeros(batch, self.window - 1, *size, device=device)
        count = torch.zeros(batch, dtype=torch.int64, device=matrix.device)
        return {"S": matrix, "k": waiting, "v": torch.zeros_like(waiting), "count": count}

    def ranges(self) -> dict[str, Range]:
        return {"count": (0, self.window - 1)}

    def recurrence_flops(self, tokens: int) -> int:
        whole, rest = divmod(tokens, self.window)
        seen = whole * self.window * (self.window + 1) // 2 + rest * (rest + 1) // 2
        memory = tokens * self.head_dim * (self.head_dim + 1) * (6 if self.delta else 4)
        return self.num_heads * (seen * self.head_dim * 4 + memory)
