"""Linear attention whose weights are exponentials of what may be large, kept finite by a running maximum.

    S_t = exp(f_t) S_{t-1} + exp(i_t) k_t v_t^T        f_t <= 0, i_t any number

is carried as ``S_t exp(-m_t)`` beside its scale ``m_t = max(m_{t-1} + f_t, i_t)``, so that no factor is above one:

    S'_t = exp(m_{t-1} + f_t - m_t) S'_{t-1} + exp(i_t - m_t) k_t v_t^T

The last column of v is one: S's last column is the sum of the weighted keys, the normaliser. From nothing m is 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linstate.mixers.base import Mixer
from linstate.ops import linear_attention
from linstate.types import LayerState


class ExponentialMixer(Mixer):
    """See the module. State: ``S [B, H, K, V + 1]`` in units of ``exp(m)``, ``m [B, H]``."""

    recurrence = "linear_attention"
    num_heads: int
    k_dim: int
    v_dim: int

    @staticmethod
    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        i: Tensor,
        f: Tensor | None,
        scale: float,
        state: LayerState | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, LayerState]:
        """Sum and normaliser in units of ``exp(m)``: ``[B, T, H, V]``, ``[B, T, H, 1]``, ``m [B, T, H, 1]``, state.

        ``q, k [B, T, H, K]``, ``v [B, T, H, V]``, ``i, f [B, T, H]`` in the dtype of states; f None is 0.
        """
        before = state["m"] if state else None
        f = torch.zeros_like(i) if f is None else f
        m, g, last = running_maximum(i, f, before, cu_seqlens)
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)  # [B, T, H, V + 1]
        o, matrix = linear_attention(
            q,
            k.to(i.dtype) * (i - m).exp()[..., None],
            v.to(i.dtype),
            g,
            scale=scale,
            initial_state=state["S"] if state else None,
            cu_seqlens=cu_seqlens,
        )
        return o[..., :-1], o[..., -1:], m[..., None], {"S": matrix, "m": last}

    def init_state(self, batch: int, *, device: torch.device | str | None = None) -> LayerState:
        return {
            "S": self.zeros(batch, self.num_heads, self.k_dim, self.v_dim + 1, device=device),
            "m": self.zeros(batch, self.num_heads, device=device),
        }

    @classmethod
    def add(cls, first: LayerState, later: LayerState) -> LayerState:
        m = torch.maximum(first["m"], later["m"])
        parts = (part["S"] * (part["m"] - m).exp()[..., None, None] for part in (first, later))
        return {"S": sum(parts, torch.zeros_like(later["S"])), "m": m}

    def recurrence_flops(self, tokens: int) -> int:
        return tokens * self.num_heads * self.k_dim * (self.v_dim + 1) * 5


def running_maximum(
    i: Tensor, f: Tensor, before: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """``m_t = max(m_{t-1} + f_t, i_t)``, ``m_{t-1} + f_t - m_t`` (both ``[B, T, H]``) and the last m ``[B, H]``.

    ``i, f [B, T, H]``; ``before [B, H]`` (``[N, H]`` for N packed sequences), default 0. In sums from the begin of the
    call: ``m_t = F_t + max(before, max_{s <= t} i_s - F_s)``, in float64, since F grows with the text.
    """
    if cu_seqlens is not None:
        lengths = cu_seqlens.diff().tolist()
        rows = [None] * len(lengths) if before is None else before.split(1)
        parts = [
            running_maximum(x, y, row, None)
            for x, y, row in zip(i.split(lengths, 1), f.split(lengths, 1), rows, strict=True)
        ]
        return (
            torch.cat([part[0] for part in parts], dim=1),
            torch.cat([part[1] for part in parts], dim=1),
            torch.cat([part[2] for part in parts]),
        )
    start = i.new_zeros(i.shape[0], 1, i.shape[2]) if before is None else before[:, None]
    total = F.pad(f.double().cumsum(1), (0, 0, 1, 0))  # [B, T + 1, H]
    highest = torch.cat([start.double(), i.double() - total[:, 1:]], dim=1).cummax(1).values
    m = total + highest
    g = (highest[:, :-1] - highest[:, 1:]).to(i.dtype)  # m_{t-1} + f_t - m_t, exactly <= 0
    m = m.to(i.dtype)
    return m[:, 1:], g, m[:, -1].clone()
