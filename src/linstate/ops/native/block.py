"""Many tokens of a mixer between its projections on a CPU: what stands before the recurrence in one call, what stands behind it in another.

The convolution and the recurrence are the kernels of ``scan.py`` and ``matrix.py``; ``csrc/block.cpp`` has the gates,
norms and shifts, in float32 between reading and writing. No gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from linstate.ops.dispatch import register
from linstate.ops.fused.plan import Operands, Plan
from linstate.ops.native import matrix as native_matrix
from linstate.ops.native.mixer import refuses
from linstate.ops.native.scan import run_conv
from linstate.ops.native.tensors import address, state_of

_Row = tuple[int, int, bool]


def rows_of(t: Tensor | None) -> tuple[Tensor | None, _Row | None]:
    """A tensor ``[B, T, D]``, or a weight, and how the kernels find its rows: address, stride of tokens, whether it is bf16."""
    if t is None:
        return None, None
    if t.dtype is not torch.float32 and t.dtype is not torch.bfloat16:
        t = t.float()
    if t.dim() != 3:
        t = t.contiguous()
        return t, (t.data_ptr(), 0, t.dtype is torch.bfloat16)
    batch, tokens, _ = t.shape
    if t.stride(2) != 1 or (batch > 1 and t.stride(0) != tokens * t.stride(1)):
        t = t.contiguous()
    return t, (t.data_ptr(), t.stride(1), t.dtype is torch.bfloat16)


def made(t: Tensor | None) -> _Row | None:
    """:func:`rows_of` for a tensor ``[B, T, ...]`` that was made here, without gaps."""
    return None if t is None else (t.data_ptr(), t[0, 0].numel(), t.dtype is torch.bfloat16)


@register("fused", "chunked", "native", refuses=refuses, packs=True)
def prefill(
    plan: Plan,
    mixed: Tensor,
    matrix: Tensor | None,
    tail: Tensor | None,
    of: Operands,
    cu_seqlens: Tensor | None,
    bounds: list[int] | None,
    norm: object,
) -> tuple[Tensor, Tensor, Tensor]:
    """Any number of tokens; arguments as in :func:`linstate.ops.fused.definition.run`."""
    import linstate._native as _native

    key, value, beta = of.key, of.value, of.beta
    batch, tokens, _ = mixed.shape
    rows = batch if bounds is None else len(bounds) - 1
    at, channels, taps = plan.conv
    matrix = state_of("matrix", matrix, (rows, plan.hv, plan.k, plan.v))
    tail = state_of("convolution", tail, (rows, max(0, taps - 1), channels))
    tail_after = mixed.new_empty((rows, max(0, taps - 1), channels), dtype=torch.float32)
    if taps:
        assert of.weight is not None
        x = mixed[..., at : at + channels]
        mixed, tail_after = run_conv(x, of.weight, of.bias, tail, "silu", bounds)
        plan = plan.behind_conv

    def part(at: int, heads: int, size: int) -> Tensor:
        return mixed[..., at : at + heads * size].unflatten(-1, (heads, size))

    q, k, v = part(plan.q_at, plan.hk, plan.k), None, None
    k = part(plan.k_at, plan.hk, plan.k) if key is None else key.unflatten(-1, (plan.hk, plan.k))
    v = part(plan.v_at, plan.hv, plan.v) if value is None else value.unflatten(-1, (plan.hv, plan.v))
    new_q = new_k = new_v = new_beta = g = None
    if plan.unit_eps is not None:
        q = new_q = mixed.new_empty((batch, tokens, plan.hk, plan.k))
        k = new_k = torch.empty_like(new_q)
    if plan.stepped_values:
        v = new_v = mixed.new_empty((batch, tokens, plan.hv, plan.v))
    if beta is not None:
        new_beta = mixed.new_empty((batch, tokens, plan.hv), dtype=torch.float32)
    if plan.decay != "none":
        ends = {"head": (plan.hv,), "channel": (plan.hv, plan.k)}.get(plan.decay, (plan.hk, plan.k))
        g = mixed.new_empty((batch, tokens, *ends), dtype=torch.float32)
    # Held by name: an address keeps nothing alive.
    gates = (mixed, None, None, beta, of.step, of.rate, of.step_bias, of.skip, None)
    held = [rows_of(t) for t in (*gates, of.norm, of.norm_bias, of.z, key, value)]
    call = (plan.sizes, plan.numbers, batch * tokens, (*(place for _, place in held), None))
    threads = torch.get_num_threads()
    outs = (made(new_q), made(new_k), made(new_v), made(new_beta), made(g))
    if any(out is not None for out in outs):
        _native.mixer_gates(*call, outs, threads)
    kind = native_matrix.KINDS.index(plan.recurrence)
    o, after, _ = native_matrix.run(
        kind, q, k, v, None, None, new_beta, g, of.bonus, matrix, plan.scale, bounds, 0
    )  # [B, T, Hv, V]
    _native.mixer_finish(*call, made(o), made(o), threads)
    return o.flatten(-2), after, tail_after


def shift(x: Tensor, before: Tensor | None, mix: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """As ``native_rwkv.shift`` for any number of tokens."""
    import linstate._native as _native

    batch, tokens, size = x.shape
    before = state_of("shift", before, (batch, 1, size))
    y = x.new_empty((mix.shape[0], batch, tokens, size))
    narrow = torch.bfloat16
    x, mix = x.contiguous(), mix.contiguous()
    _native.shift_tokens(
        batch * tokens,
        tokens,
        size,
        mix.shape[0],
        made(x),
        (mix.data_ptr(), size, mix.dtype is narrow),
        (y.data_ptr(), batch * tokens * size, y.dtype is narrow),
        address(before),
        torch.get_num_threads(),
    )
    return y.unbind(0), x[:, -1:].to(torch.float32, copy=True)  # a copy: a state keeps no block alive


def time_mix(
    given: Sequence[Tensor | None], heads: int, eps: float, matrix: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As ``native_rwkv.time_mix``, whose tensors ``given`` are in its order, for any number of tokens."""
    import linstate._native as _native

    r, k, v, decay, rate, value_rate, first, gate, k_k, k_a, r_k, weight, bias = given
    assert r is not None and k is not None and v is not None
    batch, tokens, inner = r.shape
    size = inner // heads
    matrix = state_of("matrix", matrix, (batch, heads, size, size))
    a, b, new_k = (k.new_empty(k.shape) for _ in range(3))
    new_v = None if value_rate is None else v.new_empty(v.shape)
    g = k.new_empty(k.shape, dtype=torch.float32)
    sizes, threads = (batch * tokens, heads, size), torch.get_num_threads()
    held = [rows_of(t) for t in (r, k, v, decay, rate, value_rate, first, gate, k_k, k_a, r_k, weight, bias)]
    places = [place for _, place in held]
    outs = (made(new_k), made(new_v), made(a), made(b), made(g))
    _native.rwkv7_gates(*sizes, tuple(places), outs, threads)
    if new_v is not None:
        v, places[2] = new_v, made(new_v)
    places[1] = made(new_k)
    q, new_k, v, a, b, g = (t.unflatten(-1, (heads, size)) for t in (r, new_k, v, a, b, g))
    kind = native_matrix.KINDS.index("dplr")
    o, after, _ = native_matrix.run(kind, q, new_k, v, a, b, None, g, None, matrix, 1.0, None, 0)
    _native.rwkv7_finish(*sizes, eps, tuple(places), made(o), made(o), threads)
    return o.flatten(-2), after
