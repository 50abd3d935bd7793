"""DeltaProduct: n steps of the delta rule for each token, so that a token's transition is a product of n reflections.

    S_t = A_t S_{t-1} + sum_j (prod_{i > j} (I - beta_i k_i k_i^T)) beta_j k_j v_j^T      o_t = S_t^T q_t
    A_t = prod_{j = n..1} (I - beta_j k_j k_j^T) exp(g_t)      k_j, v_j, beta_j of token t and step j = 1..n
    q, k_j = l2norm(silu(conv(W x)))      v_j = silu(conv(W x))      beta_j = 2 sigmoid(W_b x)
    g = -exp(A_log) softplus(W_a x + dt_bias), or no decay      y = W_o (rms_norm(o) * silu(W_z x))

The paper's n_h is n (``steps``), its H_{i,j} is S after step j; its S is the transpose of ours. beta up to 2 lets
``I - beta k k^T`` reflect (eigenvalue -1), and n reflections make any rotation of n dimensions; ``negative_eigenvalues``
False leaves beta in [0, 1]. With ``decay`` it is the paper's Gated DeltaProduct; n = 1 is (gated) DeltaNet.

n steps are n sub-tokens of the recurrence: the first brings the decay, the last is read.

Source: Siems, Carstensen, Zela, Hutter, Pontil, Grazzi 2025, DeltaProduct, arXiv 2502.10297, section 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linstate.mixers._delta import DeltaMixer
from linstate.mixers.parts import GatedRMSNorm, heads, init_log_uniform_dt
from linstate.ops import delta_rule
from linstate.ops.features import l2_norm
from linstate.ops.gates import softplus_decay
from linstate.types import LayerState


class DeltaProduct(DeltaMixer):
    """See the module. State: ``S [B, Hv, K, V]``, ``conv [B, W - 1, (1 + n) Hk K + n Hv V]``."""

    equation = "S_t = H_n ... H_1 exp(g) S_{t-1} + writes, H_j = I - b_j k_j k_j^T"
    source = "Siems 2025, arXiv 2502.10297"

    def __init__(
        self,
        d_model: int,
        num_heads: int | None = None,
        head_dim: int = 64,
        num_v_heads: int | None = None,
        v_head_dim: int | None = None,
        steps: int = 2,
        decay: bool = True,
        conv_width: int = 4,
        negative_eigenvalues: bool = True,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(
            d_model, num_heads, head_dim, num_v_heads, v_head_dim, conv_width, negative_eigenvalues, steps
        )
        self.decays = decay
        sizes = [self.values, steps * self.hv, self.hv if decay else 0]  # z, beta, a
        self.add_projections(sizes, GatedRMSNorm(self.v_dim, norm_eps))
        if decay:
            self.A_log = nn.Parameter(torch.empty(self.hv).uniform_(1, 16).log())
            self.dt_bias = nn.Parameter(init_log_uniform_dt(self.hv))

    def gates(self, *projected: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        z, beta, a = projected
        return beta, softplus_decay(a, self.dt_bias, self.A_log) if self.decays else None, z

    def of_steps(self, x: Tensor, count: int) -> Tensor:
        """``[B, T, n * H * D] -> [B, T * n, H, D]``: each step is a token of the recurrence."""
        return x.unflatten(-1, (self.steps, count, -1)).flatten(1, 2)

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        shared: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, LayerState]:
        state = state or {}
        qkv, *rest = self.in_proj(x).split(self.sizes, dim=-1)
        qkv, tail = self.conv(qkv, state.get("conv"), cu_seqlens)
        q, k, v = qkv.split(self.qkv_sizes, dim=-1)
        beta, g, z = self.gates(*rest)
        q, n = l2_norm(heads(q, self.hk)), self.steps
        if n > 1:
            q = q.repeat_interleave(n, dim=1)  # [B, T * n, Hk, K], read behind the last step only
            if g is not None:
                g = F.pad(g[:, :, None], (0, 0, 0, n - 1)).flatten(
                    1, 2
                )  # [B, T * n, Hv], in the first step only
        o, matrix = delta_rule(
            q,
            l2_norm(self.of_steps(k, self.hk)),
            self.of_steps(v, self.hv),
            self.of_steps(beta, self.hv).squeeze(-1).sigmoid() * self.beta_scale,
            g,
            initial_state=state.get("S"),
            cu_seqlens=cu_seqlens if cu_seqlens is None or n == 1 else cu_seqlens * n,
        )
        o = o[:, n - 1 :: n]  # [B, T, Hv, V]
        assert z is not None
        y = self.norm(o, heads(z, self.hv))
        return self.out_proj(y.flatten(-2)), {"S": matrix, "conv": tail}
