"""Softmax attention of many tokens in one native call: keys are packed once for all heads and tokens that read them.

The kernel is ``csrc/attention.hpp``. It serves bf16 where there are instructions for it; elsewhere torch's fused kernel is as good.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linstate.ops import native
from linstate.ops.native import lib
from linstate.ops.native.matrix import LARGEST
from linstate.ops.tensors import dense

FEWEST = 16
"""Tokens, below which keys are packed for too few rows."""


def serves(q: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether :func:`attend` takes these, and is worth it: bf16 on the CPU, nothing that wants a gradient."""
    if not native.available or torch.compiler.is_compiling() or q.shape[1] < FEWEST:
        return False
    if max(keys.shape[-1], values.shape[-1]) > LARGEST or not native.multiplies_bf16():
        return False
    grad = torch.is_grad_enabled()
    return all(
        type(t) is Tensor and t.is_cpu and t.dtype is torch.bfloat16 and not (grad and t.requires_grad)
        for t in (q, keys, values)
    )


def attend(
    q: Tensor, keys: Tensor, values: Tensor, first_valid: Tensor, window: int | None, scale: float
) -> Tensor:
    """The output ``[B, T, Hq, V]`` for q ``[B, T, Hq, K]``, the last T of the tokens of keys ``[B, S + T, Hk, K]`` and values.

    Args:
        first_valid: ``[B]``, the first key that counts. window: how many keys a token sees; None for all.
    """
    batch, tokens, heads, _ = q.shape
    o = q.new_empty((batch, tokens, heads, values.shape[3]))
    first = first_valid.to(torch.int64).expand(batch).contiguous()
    lib.attention(
        *(dense(q), dense(keys), dense(values)),  # type: ignore[arg-type]
        first,
        window or 0,
        scale,
        o,
        torch.get_num_threads(),
    )
    return o
