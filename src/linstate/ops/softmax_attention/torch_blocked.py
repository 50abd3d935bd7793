"""Softmax attention by blocks of queries over the keys that they can see (torch's fused kernel in each block, or ours: ``native/attention.py``).

A block of queries against its keys only: time is linear in T for a window, and no mask of size T x T exists.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linstate.ops.dispatch import register
from linstate.ops.native import attention
from linstate.ops.softmax_attention.definition import extend

BLOCK = 512


@register("softmax_attention", "step", "torch")
@register("softmax_attention", "chunked", "torch")
def blocked(
    q: Tensor, k: Tensor, v: Tensor, cache: tuple[Tensor, Tensor, Tensor], window: int | None, scale: float
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """See the module; arguments as in :func:`linstate.ops.softmax_attention`."""
    after = extend(cache, k, v, window)
    whole = window is None and (k.dtype, v.dtype) == (after[0].dtype, after[1].dtype)
    return attend(q, k, v, cache, window, scale, joined=after[:2] if whole else None), after


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: tuple[Tensor, Tensor, Tensor],
    window: int | None,
    scale: float,
    *,
    joined: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The output alone. ``joined``: the cache with k and v behind it, where somebody has that."""
    tokens = q.shape[1]
    if tokens == 0:
        return q.new_zeros((*q.shape[:3], v.shape[3]))
    alike = False
    if q.device.type == "cpu" and not torch.compiler.is_compiling():
        cache, alike = _in_use(cache)
    past = cache[0].shape[1]
    if joined is None:
        joined = torch.cat([cache[0].to(k.dtype), k], 1), torch.cat([cache[1].to(v.dtype), v], 1)
    keys, values = (x[:, x.shape[1] - past - tokens :] for x in joined)  # [B, S + T, Hk, K or V]
    return over(q, keys, values, past - cache[2], window, scale, alike)


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
    if attention.serves(q, keys, values):
        return attention.attend(q, keys, values, first_valid, window, scale)
    tokens, hk = q.shape[1], keys.shape[2]
    past, groups = keys.shape[1] - tokens, q.shape[2] // hk
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)  # [B, Hk, S + T, *]
    if past == 0 and tokens > 1 and (window is None or window >= tokens):  # nothing but the causal triangle
        if hk == 1:
            keys, values = (x.expand(-1, groups, -1, -1) for x in (keys, values))
        elif groups > 1:
            keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
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
        # The heads of a group are rows of one block: no key is repeated.
        block = q[:, start:end].unflatten(2, (hk, groups)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        if mask is not None and groups > 1:
            mask = mask.repeat(1, 1, groups, 1)  # [B, 1, groups bq, bk]
        o = F.scaled_dot_product_attention(  # [B, Hk, groups bq, V]
            block, keys[:, :, low:high], values[:, :, low:high], mask, scale=scale
        )
        outputs.append(o.unflatten(2, (groups, end - start)).permute(0, 3, 1, 2, 4).flatten(2, 3))
    return torch.cat(outputs, dim=1).to(values.dtype)  # [B, T, Hq, V]


def _in_use(cache: tuple[Tensor, Tensor, Tensor]) -> tuple[tuple[Tensor, Tensor, Tensor], bool]:
    """The places that some row uses (a window that has just begun is mostly empty), and whether all rows use all of them.

    It looks at numbers: not for devices that would have to be waited for.
    """
    keys, values, length = cache
    most, least = (int(length.max()), int(length.min())) if len(length) else (0, 0)
    unused = keys.shape[1] - most
    return (keys[:, unused:], values[:, unused:], length), most == least
