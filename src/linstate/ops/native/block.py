"""Many tokens of a mixer between its projections on a CPU: what stands before the recurrence in one call, what stands behind it in another.

The convolution and the recurrence are the kernels of ``scan.py`` and ``matrix.py``; ``csrc/kernels/block.cpp`` has the gates,
norms and shifts, in float32 between reading and writing. No gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from linstate.ops.dispatch import register
from linstate.ops.fused.plan import Operands, Plan
from linstate.ops.native import lib
from linstate.ops.native import matrix as recurrence
from linstate.ops.native.mixer import refuses
from linstate.ops.native.plan import carried_out
from linstate.ops.native.scan import run_conv
from linstate.ops.native.tensors import rows as row
from linstate.ops.tensors import state_of


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
    mixed = row(mixed)
    threads, native = torch.get_num_threads(), carried_out(plan)
    outs = (new_q, new_k, new_v, new_beta, g)
    if any(out is not None for out in outs):
        operands = [row(t) for t in (beta, of.step, of.rate, of.step_bias, key, value)]
        gates: Any = (native, mixed, *operands, *outs, threads)
        lib.mixer_gates(*gates)
    o, after, _ = recurrence.run(
        plan.recurrence, q, k, v, None, None, new_beta, g, of.bonus, matrix, plan.scale, bounds, 0
    )  # [B, T, Hv, V]
    lib.mixer_finish(native, mixed, row(of.skip), row(of.norm), row(of.norm_bias), row(of.z), o, threads)
    return o.flatten(-2), after, tail_after


def shift(x: Tensor, before: Tensor | None, mix: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """As ``rwkv.shift`` for any number of tokens."""
    batch, tokens, size = x.shape
    before = state_of("shift", before, (batch, 1, size))
    y = x.new_empty((mix.shape[0], batch, tokens, size))
    x = x.contiguous()
    lib.shift_tokens(x, mix.contiguous(), before, y, torch.get_num_threads())
    return y.unbind(0), x[:, -1:].to(torch.float32, copy=True)  # a copy: a state keeps no block alive


def time_mix(
    given: Sequence[Tensor | None], heads: int, eps: float, matrix: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As ``rwkv.time_mix``, whose tensors ``given`` are in its order, for any number of tokens."""
    r, k, v, decay, rate, value_rate, first, gate, k_k, k_a, r_k, weight, bias = given
    assert r is not None and k is not None and v is not None
    batch, _, inner = r.shape
    size = inner // heads
    matrix = state_of("matrix", matrix, (batch, heads, size, size))
    a, b, new_k = (k.new_empty(k.shape) for _ in range(3))
    new_v = None if value_rate is None else v.new_empty(v.shape)
    g = k.new_empty(k.shape, dtype=torch.float32)
    threads = torch.get_num_threads()
    r, k, v = row(r), row(k), row(v)
    operands = (row(t) for t in (decay, rate, value_rate, first, k_k, k_a))
    gates: Any = (heads, k, v, *operands, new_k, new_v, a, b, g, threads)
    lib.rwkv7_gates(*gates)
    v = v if new_v is None else new_v
    q, kk, vv, aa, bb, gg = (t.unflatten(-1, (heads, size)) for t in (r, new_k, v, a, b, g))
    o, after, _ = recurrence.run("dplr", q, kk, vv, aa, bb, None, gg, None, matrix, 1.0, None, 0)
    lib.rwkv7_finish(heads, eps, r, new_k, v, row(gate), row(r_k), row(weight), row(bias), o, threads)  # type: ignore[arg-type]
    return o.flatten(-2), after
