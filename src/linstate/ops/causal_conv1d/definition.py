"""The definition of the short convolution: a plain loop over tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linstate.ops.dispatch import register
from linstate.types import state_dtype


@register("causal_conv1d", "step", "torch")
@register("causal_conv1d", "recurrent", "torch")
def recurrent(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Token by token: push x_t into the window of the last W inputs, multiply and sum."""
    dtype = state_dtype(x)
    width = weight.shape[1]
    taps = weight.to(dtype).t()  # [W, D]
    if bias is not None:
        bias = bias.to(dtype)
    tail = (
        x.new_zeros((x.shape[0], width - 1, x.shape[2]), dtype=dtype)
        if initial_state is None
        else initial_state
    )
    tail = tail.to(dtype)
    outputs = []
    for t in range(x.shape[1]):
        window = torch.cat([tail, x[:, t : t + 1].to(dtype)], dim=1)  # [B, W, D]
        y = (window * taps).sum(1)  # [B, D]
        if bias is not None:
            y = y + bias
        outputs.append(F.silu(y) if activation == "silu" else y)
        tail = window[:, 1:]
    return (torch.stack(outputs, dim=1) if outputs else x).to(x.dtype), tail.clone()
