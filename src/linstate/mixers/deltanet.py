"""DeltaNet: a memory in which a new value replaces what the state answers to its key.

    S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        o_t = S_t^T q_t
    q, k = l2norm(silu(conv(W x)))      v = silu(conv(W x))      beta = sigmoid(W_b x)
    y = W_o rms_norm(o)

The papers' S is the transpose of ours. ``induction`` sets the weights at first so that the layer is an induction head. With ``negative_eigenvalues`` beta lies in [0, 2], so that ``I - beta k
k^T`` can reflect and the layer can count parity (Grazzi 2024, arXiv 2411.12537).

Source: Schlag, Irie, Schmidhuber 2021, Linear Transformers Are Secretly Fast Weight Programmers, arXiv
2102.11174, section 4; this parameterisation: Yang 2024, arXiv 2406.06484, section 3.
"""

from __future__ import annotations

from torch import Tensor

from linstate.mixers._delta import DeltaMixer
from linstate.mixers.parts import RMSNorm


class DeltaNet(DeltaMixer):
    """See the module. State: ``S [B, H, K, V]``, ``conv [B, W - 1, 3 H K]``."""

    equation = "S_t = (I - b k k^T) S_{t-1} + b k v^T"
    source = "Schlag 2021, arXiv 2102.11174; Yang 2024, arXiv 2406.06484"
    decays = False

    def __init__(
        self,
        d_model: int,
        num_heads: int | None = None,
        head_dim: int = 64,
        v_head_dim: int | None = None,
        conv_width: int = 4,
        negative_eigenvalues: bool = False,
        norm_eps: float = 1e-5,
        induction: bool = False,
    ) -> None:
        super().__init__(d_model, num_heads, head_dim, None, v_head_dim, conv_width, negative_eigenvalues)
        self.add_projections([self.hv], RMSNorm(self.v_dim, norm_eps))  # beta
        if induction:
            self.begin_as_induction_heads()
        self.plan_step(decay="none", gate="none")

    def gates(self, *projected: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return projected[0], None, None
