"""What the mixers of the delta rule share: projections, the short convolution, normalised q and k, and the state.

    q, k = l2norm(silu(conv(W x)))      v = silu(conv(W x))      beta = sigmoid(W_b x), or twice that
    S_t = (I - beta_t k_t k_t^T) diag(exp g_t) S_{t-1} + beta_t k_t v_t^T        o_t = S_t^T q_t
    y = W_o norm(o, z)

They differ in the gates g and z, in the norm, and in how many steps (pairs of k and v) a token makes. n steps are n
sub-tokens of the recurrence: the first brings the decay, the last is read.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linstate.errors import ConfigError
from linstate.mixers.base import Mixer, head_count
from linstate.mixers.parts import RMSNorm, ShortConvolution, begin_as_induction, heads
from linstate.ops import delta_rule
from linstate.ops.features import l2_norm
from linstate.ops.native import mixer as native_mixer
from linstate.types import LayerState


class DeltaMixer(Mixer):
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
        """beta before its sigmoid ``[B, T, n Hv]``, the log decay g, and z ``[B, T, Hv V]`` for a gated norm."""

    def of_steps(self, x: Tensor, count: int) -> Tensor:
        """``[B, T, n * H * D] -> [B, T * n, H, D]``: each step is a token of the recurrence."""
        return x.unflatten(-1, (self.steps, count, -1)).flatten(1, 2)

    plan: native_mixer.Plan | None = None
    """The native step of one token, where there is one (:meth:`plan_step`)."""

    def plan_step(self, decay: str, gate: str) -> None:
        """Have single tokens served natively: ``decay`` and ``gate`` as in :class:`native_mixer.Plan`; see :meth:`raw_gates`."""
        self.plan = native_mixer.Plan(
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

    def raw_gates(self, *projected: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What the native step begins with: beta before its sigmoid, the steps before bias and softplus, and z.

        Without a decay that is what :meth:`gates` makes; a mixer that has one says its own.
        """
        return self.gates(*projected)

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
        if self.plan and native_mixer.serves(
            self.recurrence, self, qkv, state.get("S"), cu_seqlens, self.plan.of_many
        ):
            beta, step, z = self.raw_gates(*rest)
            y, matrix, tail = native_mixer.step(
                self.plan,
                qkv,
                state.get("S"),
                state.get("conv"),
                weight=self.conv.weight,
                beta=beta,
                step=step,
                rate=getattr(self, "A_log", None),
                step_bias=getattr(self, "dt_bias", None),
                norm=self.norm.weight,
                z=z,
                cu_seqlens=cu_seqlens,
            )
            return self.out_proj(y), {"S": matrix, "conv": tail}
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
        y = self.norm(o) if z is None else self.norm(o, heads(z, self.hv))
        return self.out_proj(y.flatten(-2)), {"S": matrix, "conv": tail}

    def init_state(self, batch: int, *, device: torch.device | str | None = None) -> LayerState:
        matrix = self.zeros(batch, self.hv, self.k_dim, self.v_dim, device=device)
        return {"S": matrix, "conv": self.conv.init_state(batch, device or self.device)}

    def recurrence_flops(self, tokens: int) -> int:
        per_entry = 4 * self.steps + 2 + self.decays  # answer 2 and write 2 in each step, read 2, decay 1
        return tokens * self.hv * self.k_dim * self.v_dim * per_entry
