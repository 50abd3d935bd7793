"""The definition of softmax attention: a plain loop over tokens that looks at every token it may see."""

from __future__ import annotations

import torch
from torch import Tensor

from linstate.ops.dispatch import register
from linstate.ops.zeros import LEAST, untouched_zeros
from linstate.types import state_dtype


def extend(
    cache: tuple[Tensor, Tensor, Tensor], k: Tensor, v: Tensor, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The cache after the tokens of ``k`` and ``v``, cut to the W - 1 newest places of a window."""
    past, tokens = cache[0].shape[1], k.shape[1]
    places = past + tokens if window is None else window - 1
    old, new = min(past, max(0, places - tokens)), min(tokens, places)
    if window is not None and _looks(cache[0]):
        used = min(old, int(cache[2].max()) if len(cache[2]) else 0)  # before these are zeros
        if (places - used - new) * cache[0][:, :1].nbytes >= LEAST:
            keys, values = (
                _behind_zeros(before[:, past - used :], x[:, tokens - new :], places)
                for before, x in zip(cache[:2], (k, v), strict=True)
            )
            return keys, values, (cache[2] + tokens).clamp(max=places)
    # a copy: a slice, which of one row is contiguous, would keep the keys of the whole text alive
    keys, values = (
        torch.cat([before[:, past - old :], x[:, tokens - new :].to(before.dtype)], 1)
        for before, x in zip(cache[:2], (k, v), strict=True)
    )
    length = cache[2] + tokens
    if window is not None:
        if short := places - old - new:
            keys, values = (torch.nn.functional.pad(x, (0, 0, 0, 0, short, 0)) for x in (keys, values))
        length = length.clamp(max=places)
    return keys, values, length


def _looks(cache: Tensor) -> bool:
    """Whether the lengths may be looked at: on a CPU, and where no gradient flows through what is written."""
    return cache.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _behind_zeros(before: Tensor, new: Tensor, places: int) -> Tensor:
    """``before`` and ``new`` as the last of ``places``; the pages of the zeros before them are not written."""
    found = untouched_zeros((new.shape[0], places, *new.shape[2:]), before)
    start = places - before.shape[1] - new.shape[1]
    found[:, start : places - new.shape[1]] = before
    found[:, places - new.shape[1] :] = new
    return found


@register("softmax_attention", "recurrent", "torch")
def recurrent(
    q: Tensor, k: Tensor, v: Tensor, cache: tuple[Tensor, Tensor, Tensor], window: int | None, scale: float
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """For each token: products with all keys it sees, softmax in float32 (or float64), weighted sum of the values."""
    dtype = state_dtype(q, k, v)
    groups = q.shape[2] // k.shape[2]
    after = extend(cache, k, v, window)
    q, k, v_wide = q.to(dtype) * scale, k.to(dtype), v.to(dtype)
    cache = (cache[0].to(dtype), cache[1].to(dtype), cache[2])
    outputs = []
    for t in range(q.shape[1]):
        keys, values, length = extend(cache, k[:, t : t + 1], v_wide[:, t : t + 1], None)
        places = keys.shape[1]
        age = places - 1 - torch.arange(places, device=q.device)  # 0 for the token itself
        seen = age < length[:, None]  # [B, S]
        if window is not None:
            seen = seen & (age < window)
        full = keys.repeat_interleave(groups, dim=2)  # [B, S, Hq, K]
        logits = torch.einsum("bhk,bshk->bhs", q[:, t], full)
        weights = logits.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
        outputs.append(torch.einsum("bhs,bshv->bhv", weights, values.repeat_interleave(groups, dim=2)))
        cache = extend(cache, k[:, t : t + 1], v_wide[:, t : t + 1], window)
    o = torch.stack(outputs, dim=1) if outputs else q.new_zeros((*q.shape[:3], v.shape[3]))
    return o.to(v.dtype), after
