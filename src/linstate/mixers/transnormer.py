"""TransNormerLLM: lightning attention with a fixed decay, a learned rotation in the first layer, and a gate.

    S_t = exp(g_h) S_{t-1} + k_t v_t^T      o_t = S_t^T q_t
    q, k = lrpe(silu(W x), t)      v, u = W x      y = W_o (srms_norm(o) * u)
    lrpe(x, t) = [x cos(theta t); x sin(theta t)] in the model's first layer, else x
    srms_norm(o) = o / rms(o), without a weight

g is in :mod:`linstate.mixers._lightning`. The paper's lambda is ``exp(g)``, its LRPE-d the rotation with the decay;
``lrpe(q, t) . lrpe(k, s) = sum_i q_i k_i cos(theta_i (t - s))``. Its feed-forward is SGLU, its norms are SRMSNorm.

Source: Qin 2023, TransNormerLLM, arXiv 2307.14995, section 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linstate.mixers._lightning import LightningMixer
from linstate.mixers.base import ALONE, Place
from linstate.mixers.parts import positions
from linstate.types import MOST_TOKENS, LayerState, Range, state_dtype


class TransNormer(LightningMixer):
    """See the module. State: ``S [B, H, K, V]``; in the first layer, where K is ``2 V``, also ``position [B]`` int64."""

    equation = "S_t = exp(g) S_{t-1} + k v^T, g fixed per head and layer, k rotated"
    source = "Qin 2023, arXiv 2307.14995"
    composition = "refused"  # keys of the first layer carry absolute positions
    feed_forward = "sglu"

    def __init__(
        self,
        d_model: int,
        num_heads: int | None = None,
        head_dim: int = 128,
        norm_eps: float = 1e-5,
        *,
        place: Place = ALONE,
    ) -> None:
        super().__init__(d_model, num_heads, head_dim, norm_eps, place, norm_weight=False)
        self.theta = None
        if place.layer == 0:
            self.k_dim = 2 * head_dim
            speed = 10000.0 ** (-2 * torch.arange(self.num_heads * head_dim) / (self.num_heads * head_dim))
            self.theta = nn.Parameter(speed.unflatten(0, (self.num_heads, head_dim)))

    def qkvu(
        self, q: Tensor, k: Tensor, v: Tensor, u: Tensor, state: LayerState, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, LayerState]:
        q, k = F.silu(q), F.silu(k)
        if self.theta is None:
            return q, k, v, u, {}
        position, after = positions(state.get("position"), q, cu_seqlens)
        angle = position[..., None, None] * self.theta.double()  # [B, T, H, V]
        turn = torch.cat([angle.cos(), angle.sin()], dim=-1).to(state_dtype(q))  # [B, T, H, K]
        q, k = ((torch.cat([x, x], dim=-1) * turn).to(x.dtype) for x in (q, k))
        return q, k, v, u, {"position": after}

    def init_state(self, batch: int, *, device: torch.device | str | None = None) -> LayerState:
        state = super().init_state(batch, device=device)
        if self.theta is not None:
            state["position"] = torch.zeros(batch, dtype=torch.int64, device=state["S"].device)
        return state

    def ranges(self) -> dict[str, Range]:
        return {} if self.theta is None else {"position": (0, MOST_TOKENS)}
