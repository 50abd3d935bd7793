"""Mixers whose middle is one op: projections, then :func:`linstate.ops.fused` as their plan says, then the last projection.

Such a mixer says three things: its projections, its plan, and what of the one the other reads (:meth:`PlannedMixer.project`).
Training, prefill and decoding are this one path; which kernel carries the plan out is the business of the table of kernels.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

from torch import Tensor, nn

from linstate.mixers.base import Mixer
from linstate.mixers.parts import GatedRMSNorm
from linstate.ops.fused import Operands, Plan, fused
from linstate.types import LayerState


class PlannedMixer(Mixer):
    """See the module. State: ``S`` and, where the plan has a convolution, ``conv``; what :meth:`project` adds to it."""

    plan: Plan
    """What stands between the projections."""
    out_proj: nn.Linear

    @abstractmethod
    def project(
        self, x: Tensor, state: LayerState, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Operands, LayerState]:
        """``x [B, T, D]`` -> the channels that the plan cuts up ``[B, T, *]``, what else it reads, and the rest of the state after."""

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        shared: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, LayerState]:
        state = state or {}
        mixed, operands, rest = self.project(x, state, cu_seqlens)
        y, matrix, tail = fused(
            self.plan,
            mixed,
            operands,
            matrix=state.get("S"),
            tail=state.get("conv"),
            cu_seqlens=cu_seqlens,
            norm=self.own_norm,
        )
        after = {"S": matrix, "conv": tail} if self.plan.conv[2] else {"S": matrix}
        return self.out_proj(y), {**after, **rest}

    @property
    def own_norm(self) -> Callable[[Tensor], Tensor] | None:
        """The norm as a layer, which a packed model has replaced by a faster one; None where it is one with the gate."""
        norm = self._modules.get("norm")
        return None if norm is None or isinstance(norm, GatedRMSNorm) else norm
