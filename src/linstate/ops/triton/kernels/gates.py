"""What stands before and behind a recurrence: activations of gates, the convolution's state; all in float32."""

import triton
import triton.language as tl


@triton.jit
def log1p_unit(y):
    """``log(1 + y)`` for y in [0, 1]: 2 atanh(y / (2 + y)), whose series ends at 1.4e-8 as y / (2 + y) <= 1/3; small y keep their digits."""
    s = y / (y + 2.0)
    t = s * s
    p = (1.0 / 13.0) * t + 1.0 / 11.0
    p = p * t + 1.0 / 9.0
    p = p * t + 1.0 / 7.0
    p = p * t + 0.2
    p = p * t + 1.0 / 3.0
    p = p * t + 1.0
    return s * p * 2.0


@triton.jit
def softplus(x):
    return tl.maximum(x, 0.0) + log1p_unit(tl.exp(-tl.abs(x)))


@triton.jit
def log_sigmoid(x):
    return tl.minimum(x, 0.0) - log1p_unit(tl.exp(-tl.abs(x)))


@triton.jit
def sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0.0, 1.0, e) / (1.0 + e)


@triton.jit
def elu_plus_one(x):
    return tl.where(x > 0.0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))


@triton.jit
def opened(out, z, GATE: tl.constexpr):
    """The output through its gate: 0 none, 1 SiLU, 2 sigmoid."""
    if GATE == 1:
        out = out * z * sigmoid(z)
    if GATE == 2:
        out = out * sigmoid(z)
    return out


@triton.jit
def save_tail(
    base,
    length,
    stride,
    columns,
    ok_c,
    tail,
    after,
    at,
    D: tl.constexpr,
    W: tl.constexpr,
    WP: tl.constexpr,
    START: tl.constexpr,
):
    """The last W - 1 inputs of a sequence, ``after [W - 1, D]``; may be ``tail`` itself: all is read before anything is written."""
    w = tl.arange(0, WP)
    e = length - (W - 1) + w
    ok = (w < W - 1)[:, None] & ok_c[None, :]
    x = tl.load(
        base + e.to(tl.int64)[:, None] * stride + columns[None, :], mask=ok & (e >= 0)[:, None], other=0.0
    ).to(tl.float32)
    if START:
        before = tail + (e + (W - 1)).to(tl.int64)[:, None] * D + (at + columns)[None, :]
        x += tl.load(before, mask=ok & (e < 0)[:, None], other=0.0).to(tl.float32)
    tl.debug_barrier()
    tl.store(after + w.to(tl.int64)[:, None] * D + (at + columns)[None, :], x, mask=ok)
