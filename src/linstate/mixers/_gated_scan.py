"""What the mixers share that keep a gated average per channel: one scan, and what is made of its input and output.

    S_t = exp(g_t) * S_{t-1} + v_t        o_t = S_t        y = W_o o

They differ in how g and v are made from the token, and in what is done to o.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from linstate.mixers.base import Mixer
from linstate.ops import selective_scan
from linstate.types import LayerState, state_dtype


class GatedScan(Mixer):
    """See the module. State: ``S [B, 1, 1, E]`` for E inner channels."""

    recurrence = "selective_scan"

    def __init__(self, d_model: int, inner: int, parts: int) -> None:
        """``in_proj`` makes ``parts`` tensors of ``inner`` channels, which :meth:`gates` gets."""
        super().__init__(d_model)
        self.inner, self.parts = inner, parts
        self.in_proj = nn.Linear(d_model, parts * inner, bias=False)
        self.out_proj = nn.Linear(inner, d_model, bias=False)

    @abstractmethod
    def gates(self, *projected: Tensor, shared: dict[str, Tensor] | None) -> tuple[Tensor, Tensor]:
        """v and the log decay g ``[B, T, E]``, from projections in the state's dtype."""

    def finish(self, o: Tensor, *projected: Tensor) -> Tensor:
        """What :attr:`out_proj` is given."""
        return o

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        shared: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, LayerState]:
        projected = self.in_proj(x).chunk(self.parts, dim=-1)
        v, g = self.gates(*(part.to(state_dtype(x)) for part in projected), shared=shared)
        o, matrix = selective_scan(
            None,
            None,
            v[:, :, None].to(x.dtype),
            g[:, :, None],
            initial_state=(state or {}).get("S"),
            cu_seqlens=cu_seqlens,
        )
        return self.out_proj(self.finish(o[:, :, 0], *projected)), {"S": matrix}

    def init_state(self, batch: int, *, device: torch.device | str | None = None) -> LayerState:
        return {"S": self.zeros(batch, 1, 1, self.inner, device=device)}

    def recurrence_flops(self, tokens: int) -> int:
        return tokens * self.inner * 3
