"""One token of softmax attention between its projections in one call: norms of q and k, rotation, cache, attention, gate.

The torch path of ``mixers/_softmax.py`` is the definition. Keys and values are bf16, one row; the kernel is ``csrc/attend.hpp``.
Recorded (``ops/native/program.py``), a cache goes on in the memory that it is in, where there is room behind it.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from linstate.errors import ArgumentError
from linstate.ops import native
from linstate.ops.native import lib
from linstate.ops.native.norm import serves as plain
from linstate.ops.native.program import note_state
from linstate.ops.native.tensors import rows

Cache = tuple[Tensor, Tensor, Tensor, Tensor]
"""k ``[1, S, Hk, K]``, v ``[1, S, Hk, V]``, length ``[1]``, position ``[1]``."""


def serves(
    projected: Tensor, cache: Cache | None, cu_seqlens: Tensor | None, *weights: Tensor | None
) -> bool:
    """Whether :func:`step` takes this call: one token of one row, bf16 on the CPU, no gradient."""
    if native.reason or cu_seqlens is not None or projected.shape[:2] != (1, 1):
        return False
    given = (projected, *weights, *(cache or ())[:2])
    if any(t is not None and not isinstance(t, Tensor) for t in given) or type(projected) is not Tensor:
        return False
    narrow = all(t.dtype is torch.bfloat16 for t in (projected, *(cache or ())[:2]))
    return narrow and plain(*given)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    z: Tensor | None,
    cache: Cache | None,
    heads: tuple[int, int],
    *,
    scale: float,
    norms: tuple[Tensor | None, Tensor | None] = (None, None),
    eps: float = 0.0,
    weight_plus: float = 0.0,
    turned: int = 0,
    rotary_base: float = 1.0,
) -> tuple[Tensor, Cache]:
    """The output ``[1, 1, Hq V]`` before the last projection, and the cache after the token.

    Args:
        q, k, v, z: ``[1, 1, H K]`` as projected; z: before the sigmoid that gates the output. cache: None is empty.
        heads: Hq and Hk. norms: weights ``[K]`` of the root mean square norms of heads, ``weight_plus`` added to each.
        turned: channels of a head that turn by the position, as ``parts.rotate`` has it.
    """
    hq, hk = heads
    key, value = k.shape[-1] // hk, v.shape[-1] // hk
    if cache is None:
        empty = torch.zeros(1, dtype=torch.int64)
        cache = k.new_empty(1, 0, hk, key), v.new_empty(1, 0, hk, value), empty, empty.clone()
    places = cache[0].shape[1]
    shapes = (1, places, hk, key), (1, places, hk, value), (1,), (1,)
    if tuple(tuple(t.shape) for t in cache) != shapes:
        raise ArgumentError(
            f"the state's k, v, length and position must have the shapes {', '.join(str(list(s)) for s in shapes)}, "
            f"got {', '.join(str(list(t.shape)) for t in cache)}"
        )
    before = tuple(t.contiguous() for t in cache)
    after = (
        k.new_empty(1, places + 1, hk, key),
        v.new_empty(1, places + 1, hk, value),
        torch.empty(1, dtype=torch.int64),
        torch.empty(1, dtype=torch.int64),
    )
    y = q.new_empty(1, 1, hq * value)
    plan = _plan(hq, hk, key, value, turned, eps, weight_plus, scale, rotary_base)
    call = (plan, *(rows(t) for t in (q, k, v, z, *norms)), y)
    lib.attend(*call, before, after, torch.get_num_threads())  # type: ignore[call-arg, arg-type]
    note_state("attend", call, tuple(t for pair in zip(before, after, strict=True) for t in pair))
    return y, after


@lru_cache
def _plan(
    hq: int,
    hk: int,
    key: int,
    value: int,
    turned: int,
    eps: float,
    weight_plus: float,
    scale: float,
    rotary_base: float,
) -> lib.AttendPlan:
    """What is the same for every token of a layer."""
    return lib.AttendPlan(
        hq=hq,
        hk=hk,
        k=key,
        v=value,
        turned=turned,
        eps=eps,
        weight_plus=weight_plus,
        scale=scale,
        rotary_base=rotary_base,
    )
