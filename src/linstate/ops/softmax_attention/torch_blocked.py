"""Softmax attention by blocks of queries over the keys that they can see (torch's fused kernel in each block).

A block of queries against its keys only: time is linear in T for a window, and no mask of size T x T exists.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linstate.ops.dispatch import register
from linstate.ops.softmax_attention.definition import extend

BLOCK = 512


@register("softmax_attention", "step", "torch")
@register("softmax_attention", "chunked", "torch")
def blocked(
    q: Tensor, k: Tensor, v: Tensor, cache: tuple[Tensor, Tensor, Tensor], window: int | None, scale: float
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """See the module; arguments as in :func:`linstate.ops.softmax_attention`."""
    return attend(q, k, v, cache, window, scale), extend(cache, k, v, window)


def attend(
    q: Tensor, k: Tensor, v: Tensor, cache: tuple[Tensor, Tensor, Tensor], window: int | None, scale: float
) -> Tensor:
    """The output alone."""
    if q.shape[1] == 0:
        return q.new_zeros((*q.shape[:3], v.shape[3]))
    alike = False
    if q.device.type == "cpu" and not torch.compiler.is_compiling():
        cache, alike = _in_use(cache)
    keys = torch.cat([cache[0].to(k.dtype), k], 1)  # [B, S + T, Hk, K]
    values = torch.cat([cache[1].to(v.dtype), v], 1)  # [B, S + T, Hk, V]
    first_valid = cache[0].shape[1] - cache[2]  # [B]
    return over(q, keys, values, first_valid, window, scale, alike)


def over(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    first_valid: Tensor,
    window: int | None,
    scale: float,
    alike: bool,
) -> Tensor:
    """The output for q ``[B, T, Hq, K]``, the last T of the tokens of keys ``[B, S + T, Hk, K]`` and values, of which those from
    first_valid ``[B]`` on count. ``alike``: they all do."""
    tokens, hk = q.shape[1], keys.shape[2]
    past, groups = keys.shape[1] - tokens, q.shape[2] // hk
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)  # [B, Hk, S + T, *]
    if tokens == 1:  # the heads of a group are rows of one block: no key is repeated
        q = q[:, 0].unflatten(1, (hk, groups)).transpose(1, 2)  # [B, groups, Hk, K]
    elif hk == 1:
        keys, values = (x.expand(-1, groups, -1, -1) for x in (keys, values))
    elif groups > 1:
        keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
    if past == 0 and tokens > 1 and (window is None or window >= tokens):  # nothing but the causal triangle
        o = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, is_causal=True, scale=scale)
        return o.transpose(1, 2).to(values.dtype)
    outputs = []
    for start in range(0, tokens, BLOCK):
        end = min(start + BLOCK, tokens)
        low = 0 if window is None else max(0, past + start - window + 1)
        high = past + end
        col = torch.arange(low, high, device=q.device)
        row = past + torch.arange(start, end, device=q.device)
        seen = col <= row[:, None]  # [bq, bk]
        if window is not None:
            seen = seen & (col > row[:, None] - window)
        mask: Tensor | None = (seen & (col >= first_valid[:, None, None]))[:, None]  # [B, 1, bq, bk]
        if alike and tokens == 1:  # a token that sees all there is
            mask = None
        block = (q if tokens == 1 else q[:, start:end]).transpose(1, 2)  # [B, Hq, bq, K]
        o = F.scaled_dot_product_attention(
            block, keys[:, :, low:high], values[:, :, low:high], mask, scale=scale
        )
        outputs.append(o.transpose(1, 2))
    o = torch.cat(outputs, dim=1)
    if tokens == 1:
        o = o.transpose(1, 2).flatten(1, 2)[:, None]  # [B, 1, Hq, V]
    return o.to(values.dtype)


def _in_use(cache: tuple[Tensor, Tensor, Tensor]) -> tuple[tuple[Tensor, Tensor, Tensor], bool]:
    """The places that some row uses (a window that has just begun is mostly empty), and whether all rows use all of them.

    It looks at numbers: not for devices that would have to be waited for.
    """
    keys, values, length = cache
    most, least = (int(length.max()), int(length.min())) if len(length) else (0, 0)
    unused = keys.shape[1] - most
    return (keys[:, unused:], values[:, unused:], length), most == least
