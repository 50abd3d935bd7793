"""Based: linear attention whose features are the exponential's Taylor polynomial, to stand between sliding windows.

    S_t = S_{t-1} + phi(k_t) v_t^T      z_t = z_{t-1} + phi(k_t)      o_t = S_t^T phi(q_t) / (z_t . phi(q_t))
    phi(q) . phi(k) = 1 + s + s^2 / 2      s = q . k / sqrt d

The rest is in :mod:`linstate.mixers._normalised`. The paper's d' is d, the small size of q and k (``feature_dim``); phi
has K = 1 + d + d (d + 1) / 2 features. The paper's model puts these layers beside exact attention over a short window:
``pattern=("based", "sliding_window")``.

Source: Arora 2024, Simple linear attention language models balance the recall-throughput tradeoff, arXiv 2402.18668,
section 4.1.
"""

from __future__ import annotations

from torch import Tensor

from linstate.mixers._normalised import NormalisedMixer
from linstate.ops.features import taylor_exp


class Based(NormalisedMixer):
    """See the module. State: ``S [B, H, K, V + 1]``."""

    equation = "S_t = S_{t-1} + phi(k) v^T, phi(q) . phi(k) = 1 + s + s^2 / 2, normalised"
    source = "Arora 2024, arXiv 2402.18668"

    def __init__(
        self,
        d_model: int,
        num_heads: int | None = None,
        head_dim: int = 64,
        feature_dim: int = 16,
        eps: float = 1e-6,
    ) -> None:
        features = 1 + feature_dim + feature_dim * (feature_dim + 1) // 2
        super().__init__(d_model, num_heads, head_dim, feature_dim, features, eps)
        self.feature_dim = feature_dim

    def phi(self, x: Tensor) -> Tensor:
        return taylor_exp(x * self.feature_dim**-0.25)
