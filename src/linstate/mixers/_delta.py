"""What the mixers of the delta rule share: projections, the short convolution, normalised q and k, and the state.

    q, k = l2norm(silu(conv(W x)))      v = silu(conv(W x))      beta = sigmoid(W_b x), or twice that
    S_t = (I - beta_t k_t k_t^T) diag(exp g_t) S_{t-1} + beta_t k_t v_t^T        o_t = S_t^T q_t
    y = W_o norm(o, z)

They differ in the gates g and z, in the norm, and in how many steps (pairs of k and v) a token makes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from linstate.errors import ConfigError
from linstate.mixers._planned import PlannedMixer
from linstate.mixers.base import head_count
from linstate.mixers.parts import RMSNorm, ShortConvolution, begin_as_induction
from linstate.ops.fused import Operands, Plan
from linstate.types import LayerState


class DeltaMixer(PlannedMixer):
    """See the module. State: ``S [B, Hv, K, V]``, ``conv [B, W - 1, (1 + n) Hk K + n Hv V]`` with n steps."""

    recurrence = "delta_rule"
    decays = True

    def __init__(
        self,
        d_model: int,
        num_heads: int | None,
        head_dim: int,
        num_v_heads: int | None,
        v_head_dim: int | None,
        conv_width: int,
        negative_eigenvalues: bool,
        steps: int = 1,
    ) -> None:
        super().__init__(d_model)
        if steps < 1:
            raise ConfigError(f"steps must be at least 1, got {steps}")
        self.steps = steps
        self.hk = head_count(num_heads, d_model, head_dim)
        self.hv = self.hk if num_v_heads is None else num_v_heads
        self.k_dim, self.v_dim = head_dim, head_dim if v_head_dim is None else v_head_dim
        self.beta_scale = 2.0 if negative_eigenvalues else 1.0
        self.keys, self.values = self.hk * self.k_dim, self.hv * self.v_dim
        self.conv_width = conv_width

    def add_projections(self, sizes: Sequence[int], norm: RMSNorm) -> None:
        """The weights: ``in_proj`` makes q, k, v (of every step) and then ``sizes``, which :meth:`gates` gets."""
        self.qkv_sizes = [self.keys, self.steps * self.keys, self.steps * self.values]
        self.sizes = [sum(self.qkv_sizes), *sizes]
        self.in_proj = nn.Linear(self.d_model, sum(self.sizes), bias=False)
        self.conv = ShortConvolution(sum(self.qkv_sizes), self.conv_width)
        self.norm = norm
        self.out_proj = nn.Linear(self.values, self.d_model, bias=False)

    def begin_as_induction_heads(self) -> None:
        """Set the weights so that the layer recalls before it has learned anything (:func:`parts.begin_as_induction`)."""
        if self.conv_width < 2 or self.hk != self.hv:
            raise ConfigError("induction needs conv_width >= 2 and as many value heads as key heads")
        begin_as_induction(self.in_proj, self.conv, self.out_proj, self.keys, self.values)

    @abstractmethod
    def gates(self, *projected: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """beta before its sigmoid ``[B, T, Hv]``, the steps of the decay before bias and softplus, and z ``[B, T, Hv V]`` for a gated norm."""

    def plan_step(self, decay: str, gate: str) -> None:
        """Say the plan: ``decay`` and ``gate`` as in :class:`linstate.ops.fused.Plan`."""
        self.plan = Plan(
            recurrence="delta_rule",
            hk=self.hk,
            hv=self.hv,
            k=self.k_dim,
            v=self.v_dim,
            q_at=0,
            k_at=self.keys,
            v_at=2 * self.keys,
            scale=self.k_dim**-0.5,
            norm_eps=self.norm.eps,
            conv=(0, sum(self.qkv_sizes), self.conv_width),
            unit_eps=1e-6,
            beta_scale=self.beta_scale,
            decay=decay,
            gate=gate,
        )

    def project(
        self, x: Tensor, state: LayerState, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Operands, LayerState]:
        qkv, *rest = self.in_proj(x).split(self.sizes, dim=-1)
        beta, step, z = self.gates(*rest)
        operands = Operands(
            weight=self.conv.weight,
            beta=beta,
            step=step,
            rate=getattr(self, "A_log", None),
            step_bias=getattr(self, "dt_bias", None),
            norm=self.norm.weight,
            z=z,
        )
        return qkv, operands, {}

    def init_state(self, batch: int, *, device: torch.device | str | None = None) -> LayerState:
        matrix = self.zeros(batch, self.hv, self.k_dim, self.v_dim, device=device)
        return {"S": matrix, "conv": self.conv.init_state(batch, device or self.device)}

    def recurrence_flops(self, tokens: int) -> int:
        per_entry = 4 * self.steps + 2 + self.decays  # answer 2 and write 2 in each step, read 2, decay 1
        return tokens * self.hv * self.k_dim * self.v_dim * per_entry
