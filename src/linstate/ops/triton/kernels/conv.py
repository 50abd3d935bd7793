"""The short causal convolution, as W shifted products; SiLU on the way out, the last W - 1 inputs as the state.

Both programs see a sequence as its state followed by its inputs: place e stands for token ``e - (W - 1)``.
"""

import triton
import triton.language as tl

from linstate.ops.triton.kernels.chunk import save


@triton.jit
def place(x, state, e, stride, length, channel, ok_d, D: tl.constexpr, W: tl.constexpr, START: tl.constexpr):
    """``[BT, BD]`` in float32: places e of state and inputs, zeros beyond them and where there is no state."""
    t = e - (W - 1)
    inside = (t >= 0) & (t < length)
    found = tl.load(
        x + t.to(tl.int64)[:, None] * stride + channel[None, :],
        mask=inside[:, None] & ok_d[None, :],
        other=0.0,
    ).to(tl.float32)
    if START and W > 1:
        before = (e >= 0) & (t < 0)
        found += tl.load(
            state + e.to(tl.int64)[:, None] * D + channel[None, :],
            mask=before[:, None] & ok_d[None, :],
            other=0.0,
        ).to(tl.float32)
    return found


@triton.jit
def before_activation(
    x,
    state,
    weight,
    bias,
    t,
    stride,
    length,
    channel,
    ok_d,
    D: tl.constexpr,
    W: tl.constexpr,
    BIAS: tl.constexpr,
    START: tl.constexpr,
):
    """``[BT, BD]``: the convolution at tokens t."""
    found = place(x, state, t, stride, length, channel, ok_d, D, W, START)
    found = found * tl.load(weight + channel * W, mask=ok_d, other=0.0).to(tl.float32)[None, :]
    for w in tl.static_range(1, W):
        tap = tl.load(weight + channel * W + w, mask=ok_d, other=0.0).to(tl.float32)
        found += place(x, state, t + w, stride, length, channel, ok_d, D, W, START) * tap[None, :]
    if BIAS:
        found += tl.load(bias + channel, mask=ok_d, other=0.0).to(tl.float32)[None, :]
    return found


@triton.jit(do_not_specialize=["tokens", "spans"])
def conv(
    x,
    weight,
    bias,
    y,
    start,
    after,
    bounds,
    slots,
    x_b,
    x_t,
    tokens,
    spans,
    D: tl.constexpr,
    W: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
    START: tl.constexpr,
    PACKED: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Grid: (rows * spans of BT tokens * blocks of channels,). States ``[rows, W - 1, D]``; SLOTS: as in ``step``, in place (T = 1)."""
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
    slot = row
    if SLOTS:
        slot = tl.load(slots + row).to(tl.int64)
        ok_d = channel < tl.where(slot >= 0, D, 0)
    x += batch * x_b + first * x_t
    y += (batch * tokens + first) * D
    if START:
        start += slot * ((W - 1) * D)
    after += slot * ((W - 1) * D)
    i = tl.arange(0, BT)
    t = span * BT + i
    found = before_activation(x, start, weight, bias, t, x_t, length, channel, ok_d, D, W, BIAS, START)
    if SILU:
        found = found / (1.0 + tl.exp(-found))
    ok = (t < length)[:, None] & (channel < D)[None, :]
    save(y + t.to(tl.int64)[:, None] * D + channel[None, :], tl.where(ok_d[None, :], found, 0.0), ok)
    if W > 1 and span == tl.maximum((length + BT - 1) // BT, 1) - 1:
        for w in tl.static_range(
            0, W - 1
        ):  # one after the other, each read before it is written: a state may be in place
            e = length + w + tl.zeros([1], tl.int32)
            last = place(x, start, e, x_t, length, channel, ok_d, D, W, START)
            tl.debug_barrier()
            tl.store(after + w * D + channel[None, :], last, mask=ok_d[None, :])


@triton.jit(do_not_specialize=["tokens", "spans"])
def conv_gradients(
    x,
    weight,
    bias,
    dy,
    dafter,
    start,
    dx,
    dstart,
    dweight,
    dbias,
    bounds,
    x_b,
    x_t,
    dy_b,
    dy_t,
    tokens,
    spans,
    D: tl.constexpr,
    W: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
    START: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Grid as in ``conv``, over places instead of tokens. dweight ``[rows * spans, D, W]`` and dbias ``[rows * spans, D]``: sums are left."""
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
    dy += batch * dy_b + first * dy_t
    dx += (batch * tokens + first) * D
    if START:
        start += row * ((W - 1) * D)
    dstart += row * ((W - 1) * D)
    dafter += row * ((W - 1) * D)
    e = span * BT + tl.arange(
        0, BT
    )  # places of which dx is wanted; as tokens, those of which dweight is summed
    found = tl.zeros([BT, BD], tl.float32)
    own = program // blocks * D + channel
    for s in tl.static_range(0, W):  # token e - s has place e as its input number s
        t = e - s
        ok = ((t >= 0) & (t < length))[:, None] & ok_d[None, :]
        dout = tl.load(dy + t.to(tl.int64)[:, None] * dy_t + channel[None, :], mask=ok, other=0.0).to(
            tl.float32
        )
        if SILU:
            before = before_activation(
                x, start, weight, bias, t, x_t, length, channel, ok_d, D, W, BIAS, START
            )
            gate = 1.0 / (1.0 + tl.exp(-before))
            dout = dout * gate * (1.0 + before * (1.0 - gate))
        tap = tl.load(weight + channel * W + s, mask=ok_d, other=0.0).to(tl.float32)
        found += dout * tap[None, :]
        if s == 0:
            for w in tl.static_range(0, W):
                seen = place(x, start, e + w, x_t, length, channel, ok_d, D, W, START)
                tl.store(dweight + own * W + w, tl.sum(dout * seen, axis=0), mask=ok_d)
            if BIAS:
                tl.store(dbias + own, tl.sum(dout, axis=0), mask=ok_d)
    if W > 1:
        behind = (e >= length) & (e < length + W - 1)
        at = (e - length).to(tl.int64)[:, None] * D + channel[None, :]
        found += tl.load(dafter + at, mask=behind[:, None] & ok_d[None, :], other=0.0).to(tl.float32)
    t = e - (W - 1)
    ok = ((t >= 0) & (t < length))[:, None] & ok_d[None, :]
    save(dx + t.to(tl.int64)[:, None] * D + channel[None, :], found, ok)
    if W > 1:
        ok = (e < W - 1)[:, None] & ok_d[None, :]
        tl.store(dstart + e.to(tl.int64)[:, None] * D + channel[None, :], found, mask=ok)
