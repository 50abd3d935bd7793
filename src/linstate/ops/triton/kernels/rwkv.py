"""RWKV: the token shift with all its rates in one program, RWKV-7's time mix of one token, and what stands behind many.

What RWKV-7 makes of its projections is in :func:`made`, for one token and for a chunk: the removal key kappa, the rate a, the key that is
written, and the values mixed with those of the first layer.
"""

import triton
import triton.language as tl

from linstate.ops.triton.kernels.chunk import rounded, save
from linstate.ops.triton.kernels.gates import sigmoid


@triton.jit(do_not_specialize=["tokens", "spans", "size_of_rate"])
def shift(
    x,
    mix,
    y,
    before,
    after,
    bounds,
    x_b,
    x_t,
    tokens,
    spans,
    size_of_rate,
    D: tl.constexpr,
    M: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    START: tl.constexpr,
    PACKED: tl.constexpr,
):
    """``x_t + mix_m (x_{t-1} - x_t)`` for M rates: y ``[M, B, T, D]``. Grid: (rows * spans of BT tokens * blocks of channels,).

    before, after: ``[rows, D]`` float32, the last token of each sequence.
    """
    blocks: tl.constexpr = (D + BD - 1) // BD
    program = tl.program_id(0).to(tl.int64)
    channel = program % blocks * BD + tl.arange(0, BD)
    span = (program // blocks % spans).to(tl.int32)
    row = program // blocks // spans
    if PACKED:
        first = tl.load(bounds + row).to(tl.int64)
        length = (tl.load(bounds + row + 1).to(tl.int64) - first).to(tl.int32)
        batch = tl.zeros_like(row)
    else:
        first = tl.zeros_like(row)
        length = tokens
        batch = row
    ok_d = channel < D
    x += batch * x_b + first * x_t
    y += (batch * tokens + first) * D
    t = span * BT + tl.arange(0, BT)
    ok = (t < length)[:, None] & ok_d[None, :]
    at = x + t.to(tl.int64)[:, None] * x_t + channel[None, :]
    now = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    last = tl.load(at - x_t, mask=ok & (t > 0)[:, None], other=0.0).to(tl.float32)
    if START:
        state = tl.load(before + row * D + channel, mask=ok_d, other=0.0)
        last += tl.where((t == 0)[:, None], state[None, :], 0.0)
    place = t.to(tl.int64)[:, None] * D + channel[None, :]
    for m in tl.static_range(M):
        rate = tl.load(mix + m * D + channel, mask=ok_d, other=0.0).to(tl.float32)[None, :]
        save(y + m * size_of_rate.to(tl.int64) + place, now + rate * (last - now), ok)
    if span == tl.maximum((length + BT - 1) // BT, 1) - 1:
        end = tl.sum(tl.where((t == length - 1)[:, None], now, 0.0), axis=0)
        if START:
            end = tl.where(length > 0, end, state)
        tl.store(after + row * D + channel, end, mask=ok_d)


@triton.jit
def made_of_length(k, rate, k_k, k_a, inverse):
    """:func:`made` of some columns, where one over the length of ``k k_k`` is known, ``[C]``."""
    k = k.to(tl.float32)
    a = sigmoid(rate.to(tl.float32))
    kappa = k * k_k * inverse[:, None]
    return kappa, -a * kappa, k * (1.0 + (a - 1.0) * k_a)


@triton.jit
def made(k, rate, k_k, k_a, eps):
    """``[C, K]`` in float32: kappa, -a kappa, and the key that is written, of keys and rates as projected."""
    kappa = k.to(tl.float32) * k_k
    return made_of_length(k, rate, k_k, k_a, 1.0 / tl.sqrt(tl.sum(kappa * kappa, axis=1) + eps))


@triton.jit
def in_type_of(x, like):
    return rounded(x, like.dtype).to(like.dtype)


@triton.jit
def log_decay(raw):
    """``-exp(-1/2) sigmoid(raw)``."""
    return -0.6065306597126334 * sigmoid(raw.to(tl.float32))


@triton.jit
def behind(o, r, k, v, gate, r_k, norm, norm_bias, eps, K: tl.constexpr, ok):
    """Rows ``[C, K]`` of a head: the norm to mean 0 and variance 1, the bonus ``(r . (k * r_k)) v``, the gate."""
    o = tl.where(ok, o - (tl.sum(o, axis=1) / K)[:, None], 0.0)
    o = o / tl.sqrt(tl.sum(o * o, axis=1) / K + eps)[:, None] * norm + norm_bias
    bonus = tl.sum(r * k * r_k, axis=1)[:, None]
    return (o + bonus * v) * gate


@triton.jit
def load_channels(weight, head, kk, K: tl.constexpr):
    """``[1, K]``: the channels of a head of a weight ``[H, K]``."""
    return tl.load(weight + head * K + kk, mask=kk < K, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["eps", "kappa_eps"])
def rwkv7_step(
    r,
    k,
    v,
    decay,
    rate,
    value_rate,
    first,
    gate,
    k_k,
    k_a,
    r_k,
    norm,
    norm_bias,
    y,
    before,
    after,
    slots,
    eps,
    kappa_eps,
    H: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    MIXES: tl.constexpr,
    BIAS: tl.constexpr,
    START: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """One token of RWKV-7 between its projections. Grid: (rows * H,): a program has a head's whole state, as its norm needs. Inputs without gaps."""
    program = tl.program_id(0).to(tl.int64)
    head, row = program % H, program // H
    if SLOTS:
        slot = tl.load(slots + row).to(tl.int64)
        live = slot >= 0
        slot = tl.maximum(slot, 0)
    else:
        slot = row
        live = row >= 0
    kk = tl.arange(0, BK)
    ok = (kk < tl.where(live, K, 0))[None, :]
    at = program * K + kk[None, :]
    r_row = tl.load(r + at, mask=ok, other=0.0).to(tl.float32)  # [1, K], as all that follow
    k_row = tl.load(k + at, mask=ok, other=0.0)
    v_row = tl.load(v + at, mask=ok, other=0.0).to(tl.float32)
    rate_row = tl.load(rate + at, mask=ok, other=0.0)
    gate_row = tl.load(gate + at, mask=ok, other=0.0).to(tl.float32)
    d_row = tl.exp(log_decay(tl.load(decay + at, mask=ok, other=0.0)))
    if MIXES:
        share = sigmoid(tl.load(value_rate + at, mask=ok, other=0.0).to(tl.float32))
        v_row += (tl.load(first + at, mask=ok, other=0.0).to(tl.float32) - v_row) * share
    kappa, a_row, k_row = made(
        k_row, rate_row, load_channels(k_k, head, kk, K), load_channels(k_a, head, kk, K), kappa_eps
    )
    ok_state = (kk < tl.where(live, K, 0))[:, None] & ok
    state_at = (slot * H + head) * (K * K) + kk.to(tl.int64)[:, None] * K + kk[None, :]
    state = tl.zeros([BK, BK], tl.float32)
    if START:
        state = tl.load(before + state_at, mask=ok_state, other=0.0)
    found = tl.sum(tl.trans(kappa) * state, axis=0)[None, :]
    state = tl.trans(d_row) * state + tl.trans(a_row) * found + tl.trans(k_row) * v_row
    tl.store(after + state_at, state, mask=ok_state)
    o = tl.sum(tl.trans(r_row) * state, axis=0)[None, :]
    weight = load_channels(norm, head, kk, K)
    offset = tl.zeros([1, BK], tl.float32)
    if BIAS:
        offset = load_channels(norm_bias, head, kk, K)
    o = behind(o, r_row, k_row, v_row, gate_row, load_channels(r_k, head, kk, K), weight, offset, eps, K, ok)
    save(y + at, tl.where(live, o, 0.0), (kk < K)[None, :])


@triton.jit(do_not_specialize=["count", "eps", "kappa_eps"])
def rwkv7_behind(
    o,
    r,
    k,
    v,
    rate,
    value_rate,
    first,
    gate,
    k_k,
    k_a,
    r_k,
    norm,
    norm_bias,
    y,
    count,
    eps,
    kappa_eps,
    H: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    ROWS: tl.constexpr,
    MIXES: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Norm, bonus and gate behind many tokens. Grid: (H * (count / ROWS),): ROWS tokens of a head. Inputs ``[count, H, K]`` without gaps."""
    program = tl.program_id(0).to(tl.int64)
    head = program % H
    t = program // H * ROWS + tl.arange(0, ROWS)
    kk = tl.arange(0, BK)
    ok = (t < count)[:, None] & (kk < K)[None, :]
    at = (t * H + head)[:, None] * K + kk[None, :]
    k_tile = tl.load(k + at, mask=ok, other=0.0)
    v_tile = tl.load(v + at, mask=ok, other=0.0).to(tl.float32)
    if MIXES:
        share = sigmoid(tl.load(value_rate + at, mask=ok, other=0.0).to(tl.float32))
        v_tile += (tl.load(first + at, mask=ok, other=0.0).to(tl.float32) - v_tile) * share
    rate_tile = tl.load(rate + at, mask=ok, other=0.0)
    _, _, key = made(
        k_tile, rate_tile, load_channels(k_k, head, kk, K), load_channels(k_a, head, kk, K), kappa_eps
    )
    r_tile = tl.load(r + at, mask=ok, other=0.0).to(tl.float32)
    gate_tile = tl.load(gate + at, mask=ok, other=0.0).to(tl.float32)
    out = tl.load(o + at, mask=ok, other=0.0).to(tl.float32)
    weight = load_channels(norm, head, kk, K)
    offset = tl.zeros([1, BK], tl.float32)
    if BIAS:
        offset = load_channels(norm_bias, head, kk, K)
    out = behind(
        out, r_tile, key, v_tile, gate_tile, load_channels(r_k, head, kk, K), weight, offset, eps, K, ok
    )
    save(y + at, out, ok)
