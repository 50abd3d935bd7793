"""The short convolution for all tokens at once: W shifted products (a depthwise ``conv1d`` is slower on CPUs)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linstate.ops.dispatch import register
from linstate.types import state_dtype


@register("causal_conv1d", "chunked", "torch")
def chunked(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See the module; arguments as in :func:`linstate.ops.causal_conv1d`."""
    dtype = state_dtype(x)
    tokens, width = x.shape[1], weight.shape[1]
    if initial_state is None:
        initial_state = x.new_zeros((x.shape[0], width - 1, x.shape[2]), dtype=dtype)
    longer = torch.cat([initial_state.to(dtype), x.to(dtype)], dim=1)  # [B, W - 1 + T, D]
    taps = weight.to(dtype).unbind(1)  # W x [D]
    y = longer[:, width - 1 :] * taps[-1]
    for shift in range(width - 1):
        y = torch.addcmul(y, longer[:, shift : shift + tokens], taps[shift])
    if bias is not None:
        y = y + bias.to(dtype)
    if activation == "silu":
        y = F.silu(y)
    return y.to(x.dtype), longer[:, tokens:].clone()
