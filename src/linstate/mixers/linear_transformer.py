"""Linear Transformer: softmax replaced by a feature map, so that a sum over the past becomes a state.

    S_t = S_{t-1} + phi(k_t) v_t^T      z_t = z_{t-1} + phi(k_t)      phi(x) = elu(x) + 1
    o_t = S_t^T phi(q_t) / (z_t . phi(q_t))
    y = W_o o

The rest is in :mod:`linstate.mixers._normalised`.

Source: Katharopoulos, Vyas, Pappas, Fleuret 2020, Transformers are RNNs, arXiv 2006.16236, sections 3.2 and 3.4.
"""

from __future__ import annotations

from torch import Tensor

from linstate.mixers._normalised import NormalisedMixer
from linstate.mixers._planned import PlannedMixer
from linstate.ops.features import elu_plus_one
from linstate.ops.fused import Operands, Plan
from linstate.types import LayerState


class LinearTransformer(PlannedMixer, NormalisedMixer):
    """See the module. State: ``S [B, H, K, V + 1]``."""

    equation = "S_t = S_{t-1} + phi(k) v^T, phi = elu + 1, normalised"
    source = "Katharopoulos 2020, arXiv 2006.16236"

    def __init__(
        self, d_model: int, num_heads: int | None = None, head_dim: int = 64, eps: float = 1e-6
    ) -> None:
        super().__init__(d_model, num_heads, head_dim, head_dim, head_dim, eps)
        inner = self.num_heads * head_dim
        self.plan = Plan(
            recurrence="linear_attention",
            hk=self.num_heads,
            hv=self.num_heads,
            k=head_dim,
            v=head_dim,
            q_at=0,
            k_at=inner,
            v_at=2 * inner,
            scale=1.0,
            elu_plus_one=True,
            normaliser_eps=eps,
            norm="none",
        )

    def project(
        self, x: Tensor, state: LayerState, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Operands, LayerState]:
        return self.in_proj(x), Operands(), {}

    def phi(self, x: Tensor) -> Tensor:
        return elu_plus_one(x)
