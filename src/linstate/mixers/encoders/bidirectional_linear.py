"""Bidirectional linear attention: the Linear Transformer as it is without a causal mask.

    phi(x) = elu(x) + 1

Everything else as in :mod:`linstate.mixers.encoders._bidirectional`.

Source: Katharopoulos, Vyas, Pappas, Fleuret 2020, Transformers are RNNs, arXiv 2006.16236, section 3.2, equations 5, 6.
"""

from __future__ import annotations

from torch import Tensor

from linstate.mixers.encoders._bidirectional import BidirectionalMixer
from linstate.ops.features import elu_plus_one


class BidirectionalLinear(BidirectionalMixer):
    """See the module."""

    equation = "y = phi(Q) (phi(K)^T V) / phi(Q) sum phi(K), phi = elu + 1"
    source = "Katharopoulos 2020, arXiv 2006.16236"

    def __init__(
        self,
        d_model: int,
        max_length: int,
        num_heads: int | None = None,
        head_dim: int = 64,
        eps: float = 1e-6,
    ) -> None:
        super().__init__(d_model, num_heads, head_dim, eps)
        self.features = head_dim

    def phi(self, q: Tensor, k: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        return elu_plus_one(q), elu_plus_one(k)
