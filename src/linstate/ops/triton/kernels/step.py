"""One token of the recurrences on a matrix state: the state is read once and written once, by programs of BV columns each."""

import triton
import triton.language as tl

from linstate.ops.triton.kernels.chunk import save


@triton.jit
def load_vector(base, at, ok):
    return tl.load(base + at, mask=ok, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["scale"])
def step(
    q,
    k,
    v,
    a,
    b,
    beta,
    g,
    bonus,
    o,
    before,
    after,
    slots,
    q_b,
    q_h,
    k_b,
    k_h,
    v_b,
    v_h,
    a_b,
    a_h,
    b_b,
    b_h,
    beta_b,
    beta_h,
    g_b,
    g_h,
    scale,
    HV: tl.constexpr,
    Q_GROUP: tl.constexpr,
    G_GROUP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    KIND: tl.constexpr,
    GATE: tl.constexpr,
    BONUS: tl.constexpr,
    START: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Grid: (rows * HV * blocks of columns,). States ``[rows, HV, K, V]``; with SLOTS ``[slots, HV, K, V]``, row r in slot ``slots[r]``,
    and a row whose slot is negative is left out: its o is zero."""
    blocks: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0).to(tl.int64)
    block = program % blocks
    head = program // blocks % HV
    row = program // blocks // HV
    kk = tl.arange(0, BK)
    column = block * BV + tl.arange(0, BV)
    ok_k, ok_v = kk < K, column < V
    if SLOTS:
        slot = tl.load(slots + row).to(tl.int64)
    else:
        slot = row
    live = column < tl.where(slot >= 0, V, 0)
    state_at = (slot * HV + head) * (K * V) + kk.to(tl.int64)[:, None] * V + column[None, :]
    ok_state = ok_k[:, None] & live[None, :]

    state = tl.zeros([BK, BV], tl.float32)
    if START:
        state = tl.load(before + state_at, mask=ok_state, other=0.0)
    q_row = load_vector(q + row * q_b + head // Q_GROUP * q_h, kk, ok_k) * scale
    k_row = load_vector(k + row * k_b + head // Q_GROUP * k_h, kk, ok_k)
    v_row = load_vector(v + row * v_b + head * v_h, column, ok_v)
    read = tl.sum(q_row[:, None] * state, axis=0)
    if KIND == 2:
        b_row = load_vector(b + row * b_b + head // Q_GROUP * b_h, kk, ok_k)
        a_row = load_vector(a + row * a_b + head // Q_GROUP * a_h, kk, ok_k)
        found = tl.sum(b_row[:, None] * state, axis=0)
    if GATE == 1:
        state = state * tl.exp(tl.load(g + row * g_b + head // G_GROUP * g_h).to(tl.float32))
    if GATE == 2:
        state = state * tl.exp(load_vector(g + row * g_b + head // G_GROUP * g_h, kk, ok_k))[:, None]
    if KIND == 1:
        rate = tl.load(beta + row * beta_b + head * beta_h).to(tl.float32)
        v_row = rate * (v_row - tl.sum(k_row[:, None] * state, axis=0))
    state += k_row[:, None] * v_row[None, :]
    if KIND == 2:
        state += a_row[:, None] * found[None, :]
    if BONUS:  # read before the token is written, its own write weighted
        u = load_vector(bonus + head * K, kk, ok_k)
        read += tl.sum(q_row * u * k_row, axis=0) * v_row
    else:
        read = tl.sum(q_row[:, None] * state, axis=0)
    save(o + (row * HV + head) * V + column, tl.where(live, read, 0.0), ok_v)
    tl.store(after + state_at, state, mask=ok_state)
