"""RWKV-4, its time mix: an average of the values seen, weighted by the exponential of keys that fade.

    x_i = lerp(x_t, x_{t-1}, mu_i),  i in k, v, r        k = W_k x_k      v = W_v x_v      r = W_r x_r
    num_t = exp(-w) num_{t-1} + exp(k_t) v_t      den_t = exp(-w) den_{t-1} + exp(k_t)      w = exp(decay) > 0
    o_t = (num_{t-1} + exp(u + k_t) v_t) / (den_{t-1} + exp(u + k_t))
    y = W_o (sigmoid(r) * o)

The paper's letters: o is wkv, u the bonus of the present token; its mu is 1 - ours.

``exp(k)`` has no bound, so the sums are kept divided by ``exp(m_t)``, with ``m_t = max(m_{t-1} - w, k_t)``. Divided so,
they are a selective scan with q = k = A = None, and exactly: ``S_t = exp(g_t) S_{t-1} + exp(k_t - m_t) [v_t, 1]`` with
``g_t = m_{t-1} - w - m_t <= 0`` (up to the rounding of m), and m cancels in o. So the state is numerator, denominator and maximum.

Source: Peng 2023, RWKV: Reinventing RNNs for the Transformer Era, arXiv 2305.13048, section 3 and the appendix on its
time mixing as an RNN cell.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from linstate.mixers.base import ALONE, Mixer, Place
from linstate.mixers.parts import running_max, token_shift
from linstate.ops import selective_scan
from linstate.types import LayerState, state_dtype

NOTHING = -1e38
"""The maximum over no keys; float32 holds it, and differences of it with any key."""


class RWKV4(Mixer):
    """See the module. State: ``S [B, 2, 1, D]`` (numerator, denominator), ``max [B, 1, D]``, ``shift [B, 1, D]``."""

    recurrence = "selective_scan"
    equation = "S_t = exp(-w) * S_{t-1} + exp(k) * [v, 1], read as a quotient"
    source = "Peng 2023, arXiv 2305.13048"
    composition = "refused"  # each state is divided by the exponential of its own maximum
    feed_forward = "rwkv4_channel_mix"

    def __init__(self, d_model: int, *, place: Place = ALONE) -> None:
        super().__init__(d_model)
        self.mix = nn.Parameter(torch.empty(3, d_model))  # k, v, r
        self.decay = nn.Parameter(torch.empty(d_model))
        self.bonus = nn.Parameter(torch.empty(d_model))
        self.k_proj = nn.Linear(d_model, d_model, bias=False)
        self.v_proj = nn.Linear(d_model, d_model, bias=False)
        self.r_proj = nn.Linear(d_model, d_model, bias=False)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)
        self.reset(place)

    @torch.no_grad()
    def reset(self, place: Place) -> None:
        """The paper's initial values, which depend on depth and channel (appendix on parameter initialisation)."""
        depth = place.layer / max(1, place.layers - 1)  # 0 to 1
        rest = 1 - place.layer / place.layers  # 1 to almost 0
        channel = torch.arange(self.d_model)
        share = channel / self.d_model
        self.mix[0] = 1 - share**rest
        self.mix[1] = 1 - share**rest - 0.3 * depth
        self.mix[2] = 1 - share ** (0.5 * rest)
        self.decay.copy_(-5 + 8 * (channel / max(1, self.d_model - 1)) ** (0.7 + 1.3 * depth))
        self.bonus.copy_(math.log(0.3) + 0.5 * ((channel + 1) % 3 - 1))

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        shared: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, LayerState]:
        rows = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        state = state or self.init_state(rows)
        before, last = token_shift(x, state["shift"], cu_seqlens)
        k, v, r = (torch.lerp(x, before, mix) for mix in self.mix)  # [B, T, D] each
        o, after, highest = wkv(
            self.k_proj(k), self.v_proj(v), self.decay, self.bonus, state["S"], state["max"], cu_seqlens
        )
        return self.out_proj(self.r_proj(r).sigmoid() * o), {"S": after, "max": highest, "shift": last}

    def init_state(self, batch: int, *, device: torch.device | str | None = None) -> LayerState:
        return {
            "S": self.zeros(batch, 2, 1, self.d_model, device=device),
            "max": self.zeros(batch, 1, self.d_model, device=device),
            "shift": self.zeros(batch, 1, self.d_model, device=device),
        }

    def recurrence_flops(self, tokens: int) -> int:
        return tokens * self.d_model * 20


def wkv(
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    bonus: Tensor,
    sums: Tensor,
    highest: Tensor | None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The average of the module's equations, from a state to a state: o ``[B, T, D]`` in v's dtype, sums, maximum.

    Args:
        k, v: ``[B, T, D]``. decay, bonus: ``[D]``; ``w = exp(decay)``, bonus is u.
        sums: ``[B, 2, 1, D]``, numerator and denominator. highest: ``[B, 1, D]``; None where the sums are zero.
        cu_seqlens: as in :func:`linstate.ops.selective_scan`; then states are ``[N, ...]``.
    """
    wide, dtype = state_dtype(v), v.dtype
    k, v = k.double(), v.to(wide)
    w, u = decay.double().exp(), bonus.double()
    highest = torch.zeros_like(sums[:, 1]) if highest is None else highest
    begin = highest.masked_fill(sums[:, 1] == 0, NOTHING)  # [B, 1, D]
    m = running_max(k, -w.expand_as(k), begin, cu_seqlens)  # float64: exponents are small differences
    m_before, m_last = token_shift(m, begin.double(), cu_seqlens)
    g = (m_before - w - m).to(wide)
    weight = (k - m).exp().to(wide)
    totals, after = selective_scan(
        None,
        None,
        torch.stack([weight * v, weight], dim=2),  # [B, T, 2, D]
        g[:, :, None].expand(-1, -1, 2, -1),
        initial_state=sums,
        cu_seqlens=cu_seqlens,
    )
    earlier, _ = token_shift(totals.flatten(2), sums.flatten(1)[:, None], cu_seqlens)
    numerator, denominator = earlier.chunk(2, dim=-1)  # [B, T, D] each
    top = torch.maximum(m_before, u + k)
    old, new = (m_before - top).exp().to(wide), (u + k - top).exp().to(wide)
    o = ((old * numerator + new * v) / (old * denominator + new)).to(dtype)
    return o, after, m_last.to(wide).masked_fill(after[:, 1] == 0, 0.0)
