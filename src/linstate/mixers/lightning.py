"""Lightning attention of MiniMax-01: linear attention with a decay fixed for each head and layer.

    S_t = exp(g_h) S_{t-1} + k_t v_t^T      o_t = S_t^T q_t
    q, k, v = silu(W x)      y = W_o (rms_norm(o) * sigmoid(W_u x))

g and the rest as in :mod:`linstate.mixers._lightning`. From :mod:`linstate.mixers.transnormer` it differs in v, which
has an activation too, in the norm's weight, the gate's sigmoid, and in having no rotation.

Source: MiniMax 2025, MiniMax-01: Scaling Foundation Models with Lightning Attention, arXiv 2501.08313, section 2.2; Qin
2024, Lightning Attention-2, arXiv 2401.04658.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from linstate.mixers._lightning import LightningMixer
from linstate.mixers.base import ALONE, Place
from linstate.types import LayerState


class Lightning(LightningMixer):
    """See the module. State: ``S [B, H, K, K]``."""

    equation = "S_t = exp(g) S_{t-1} + k v^T, g fixed per head and layer"
    source = "MiniMax-01 2025, arXiv 2501.08313"
    depth_eps = 1e-5

    def __init__(
        self,
        d_model: int,
        num_heads: int | None = None,
        head_dim: int = 64,
        norm_eps: float = 1e-6,
        *,
        place: Place = ALONE,
    ) -> None:
        super().__init__(d_model, num_heads, head_dim, norm_eps, place, norm_weight=True)

    def qkvu(
        self, q: Tensor, k: Tensor, v: Tensor, u: Tensor, state: LayerState, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, LayerState]:
        return F.silu(q), F.silu(k), F.silu(v), u.sigmoid(), {}
