"""The inner model of test-time training: its answer, and the errors that its loss sends back through it.

``f(x; W) = x + layer_norm(z_L)`` with ``z_l = [gelu(z_{l-1}), 1] W_l`` and ``z_0 = x``: L is 1 for TTT-Linear and 2 for
TTT-MLP. The bias of a layer is the last row of its matrix. Its loss is ``|f(k) - v|^2 / 2``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT, CUBE = (2 / torch.pi) ** 0.5, 0.044715


def with_one(x: Tensor) -> Tensor:
    """``[x, 1]``: the input that meets the bias."""
    return F.pad(x, (0, 1), value=1.0)


def gelu(z: Tensor) -> Tensor:
    return F.gelu(z, approximate="tanh")


def gelu_slope(z: Tensor) -> Tensor:
    """The derivative of :func:`gelu`."""
    bend = torch.tanh(ROOT * (z + CUBE * z**3))
    return 0.5 * (1 + bend) + 0.5 * z * (1 - bend.square()) * ROOT * (1 + 3 * CUBE * z.square())


def normed(z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer norm over the last axis; ``weight, bias [H, 1, V]``."""
    return F.layer_norm(z, (z.shape[-1],), eps=eps) * weight + bias


def errors(
    k: Tensor, v: Tensor, layers: Sequence[Tensor], weight: Tensor, bias: Tensor, eps: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Input ``[.., C, K_l + 1]`` of each layer for ``k [B, H, C, K]``, and the loss's derivative by its output.

    The gradient by a layer's matrix is the outer product of the two, for each token.
    """
    inputs, outputs = [with_one(k)], [with_one(k) @ layers[0]]
    for layer in layers[1:]:
        inputs.append(with_one(gelu(outputs[-1])))
        outputs.append(inputs[-1] @ layer)
    z = outputs[-1]
    centred = z - z.mean(-1, keepdim=True)
    scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    unit = centred * scale
    back = (k + unit * weight + bias - v) * weight  # by unit
    back = (back - back.mean(-1, keepdim=True) - unit * (back * unit).mean(-1, keepdim=True)) * scale
    found = [back]
    for layer, below in zip(reversed(layers[1:]), reversed(outputs[:-1]), strict=True):
        found.append((found[-1] @ layer[..., :-1, :].transpose(-1, -2)) * gelu_slope(below))
    return inputs, found[::-1]
