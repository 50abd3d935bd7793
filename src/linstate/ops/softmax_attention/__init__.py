"""Softmax attention with a key-value cache: full or sliding window, grouped heads."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from linstate.errors import ArgumentError
from linstate.ops import dispatch
from linstate.ops.checks import Shapes, check_cu_seqlens, check_lengths
from linstate.ops.softmax_attention import by_row, definition, torch_blocked
from linstate.ops.zeros import untouched_zeros

__all__ = ["KVCache", "append", "by_row", "definition", "softmax_attention", "torch_blocked"]


class KVCache(NamedTuple):
    """Keys and values of the tokens before: rows are aligned to the right, so a new token is appended at the end.

    k ``[B, S, Hk, K]``, v ``[B, S, Hk, V]``, length ``[B]`` int64: how many of the last entries of a row count.
    """

    k: Tensor
    v: Tensor
    length: Tensor

    @staticmethod
    def empty(
        batch: int, heads: int, key: int, value: int, *, window: int | None = None, like: Tensor
    ) -> KVCache:
        """No tokens; with ``window`` the W - 1 places that it will ever need, so that its size is constant."""
        places = 0 if window is None else window - 1
        return KVCache(
            untouched_zeros((batch, places, heads, key), like),
            untouched_zeros((batch, places, heads, value), like),
            torch.zeros(batch, dtype=torch.int64, device=like.device),
        )


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    initial_state: KVCache | None = None,
    cu_seqlens: Tensor | None = None,
    form: str = "auto",
    backend: str = "auto",
) -> tuple[Tensor, KVCache]:
    """Causal softmax attention, from a cache to a cache.

    ``o_t = sum_s softmax_s(scale q_t . k_s) v_s`` over ``s <= t``, with ``window`` W over ``t - W < s <= t``.

    Args:
        q: ``[B, T, Hq, K]``, Hq a multiple of Hk. k: ``[B, T, Hk, K]``. v: ``[B, T, Hk, V]``.
        window: how many tokens, its own included, a token sees; None for all.
        scale: factor on the products, default ``K ** -0.5``.
        initial_state: a :class:`KVCache`, default empty; never mutated.
        cu_seqlens, form, backend: as in :func:`linstate.ops.linear_attention`.

    Returns:
        o ``[B, T, Hq, V]`` in v's dtype, and the cache after the tokens (with ``window``: of W - 1 places).

    Raises:
        ArgumentError: a shape, dtype, device or window does not fit.
    """
    if isinstance(initial_state, KVCache) and isinstance(initial_state.k, by_row.Rows):
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        held: Any = initial_state
        o, held = by_row.step(q, k, v, held, window, scale)
        return o, KVCache(*held)
    shapes = Shapes("softmax_attention")
    shapes.bind("q", q, "B T Hv K")
    shapes.bind("k", k, "B T Hk K")
    shapes.bind("v", v, "B T Hk V")
    shapes.groups()
    if window is not None and window < 1:
        raise ArgumentError(f"softmax_attention: window must be at least 1 token, got {window}")
    bounds = (
        None
        if cu_seqlens is None
        else check_cu_seqlens("softmax_attention", cu_seqlens, q.shape[0], q.shape[1])
    )
    rows = q.shape[0] if bounds is None else len(bounds) - 1
    cache = initial_state
    if cache is None:  # without the places of a window, which hold nothing yet
        cache = KVCache.empty(rows, shapes["Hk"], shapes["K"], shapes["V"], like=k)
    if not isinstance(cache, KVCache):
        raise ArgumentError(f"softmax_attention: initial_state must be a KVCache, got {type(cache).__name__}")
    shapes.bind("initial_state.k", cache.k, "Rows S Hk K")
    shapes.bind("initial_state.v", cache.v, "Rows S Hk V")
    if not isinstance(cache.length, Tensor) or cache.length.layout is not torch.strided:
        raise ArgumentError(
            f"softmax_attention: initial_state.length must be a dense tensor, got {type(cache.length).__name__}"
        )
    if cache.length.dtype != torch.int64 or cache.length.device != k.device:
        raise ArgumentError(
            f"softmax_attention: initial_state.length must be int64 on {k.device}, got {cache.length.dtype} "
            f"on {cache.length.device}"
        )
    if cache.k.shape[0] != rows or cache.length.shape != (rows,):
        raise ArgumentError(
            f"softmax_attention: initial_state must hold {rows} rows, got k {list(cache.k.shape)} and "
            f"length {list(cache.length.shape)}"
        )
    check_lengths("softmax_attention", cache.length, cache.k.shape[1])
    fixed = {"window": window, "scale": shapes["K"] ** -0.5 if scale is None else scale}
    held = {"cache_k": cache.k, "cache_v": cache.v}
    call = {"q": q, "k": k, "v": v, "tokens": q.shape[1], **held, **fixed}
    if bounds is None:
        kernel = dispatch.choose("softmax_attention", form, backend, call)
        o, (keys, values, length) = kernel.run(q, k, v, cache=cache, **fixed)
        return o, KVCache(keys, values, length)
    kernel = dispatch.choose("softmax_attention", form, backend, {**call, "bounds": bounds})
    outputs, caches = [], []
    for row, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        part = (x[:, start:end] for x in (q, k, v))
        o, after = kernel.run(*part, cache=tuple(x[row : row + 1] for x in cache), **fixed)
        outputs.append(o)
        caches.append(after)
    keys, values = (_align_right([after[i] for after in caches]) for i in (0, 1))
    return torch.cat(outputs, dim=1), KVCache(keys, values, torch.cat([after[2] for after in caches]))


def append(
    cache: Tensor, length: Tensor, new: Tensor, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A cache ``[B, S, ...]`` of anything, its rows aligned to the right with ``length`` places in use, and then ``new [B, T, ...]``.

    With ``cu_seqlens`` new is ``[1, T, ...]`` and its sequences go to the rows of the cache, which are made as long
    as the longest needs.
    """
    if cu_seqlens is None:
        return torch.cat([cache, new], dim=1), length + new.shape[1]
    bounds = check_cu_seqlens("append", cu_seqlens, *new.shape[:2])
    parts = zip(cache.split(1), bounds, bounds[1:], strict=False)
    rows = [torch.cat([row, new[:, start:end]], dim=1) for row, start, end in parts]
    return _align_right(rows), length + cu_seqlens.to(length).diff()


def _align_right(rows: list[Tensor]) -> Tensor:
    """Rows ``[1, S_i, ...]`` as one tensor ``[N, max S, ...]``, zeros before the shorter ones."""
    places = max(row.shape[1] for row in rows)
    return torch.cat(
        [torch.cat([row.new_zeros(1, places - row.shape[1], *row.shape[2:]), row], dim=1) for row in rows]
    )
