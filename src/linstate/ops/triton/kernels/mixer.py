"""One token of a mixer between its projections in one launch: convolution, unit length, gates, state, output norm and gate.

A program has one row, one value head and BV columns of its state. The norm needs all columns of a head, or of all heads that share a
key head, and a state of the convolution may be overwritten only when all have read it: so programs count themselves when they are through, and the last of
those that share a key head does both. Nobody waits for anybody.
"""

import triton
import triton.language as tl

from linstate.ops.triton.kernels.chunk import save
from linstate.ops.triton.kernels.gates import elu_plus_one, log_sigmoid, opened, save_tail, sigmoid, softplus


@triton.jit
def channels(
    mixed,
    tail,
    weight,
    bias,
    columns,
    ok,
    at,
    D: tl.constexpr,
    W: tl.constexpr,
    BIAS: tl.constexpr,
    START: tl.constexpr,
):
    """``[n]``: channels of the row, ``at + columns`` among those of the convolution, through it and SiLU (W = 0: as they are)."""
    x = tl.load(mixed + columns, mask=ok, other=0.0).to(tl.float32)
    if W > 0:
        of_channel = at + columns
        x = x * tl.load(weight + of_channel * W + (W - 1), mask=ok, other=0.0).to(tl.float32)
        if START:
            for w in tl.static_range(W - 1):
                tap = tl.load(weight + of_channel * W + w, mask=ok, other=0.0).to(tl.float32)
                x += tap * tl.load(tail + w * D + of_channel, mask=ok, other=0.0)
        if BIAS:
            x += tl.load(bias + of_channel, mask=ok, other=0.0).to(tl.float32)
        x = tl.where(ok, x * sigmoid(x), 0.0)
    return x


@triton.jit(
    do_not_specialize=[
        "mixed_b",
        "key_b",
        "value_b",
        "beta_b",
        "step_b",
        "z_b",
        "scale",
        "unit_eps",
        "beta_scale",
        "divisor",
        "least",
        "most",
        "norm_eps",
        "normaliser_eps",
    ]
)
def mixer_step(
    mixed,
    key,
    value,
    weight,
    bias,
    beta,
    step,
    rate,
    step_bias,
    skip,
    bonus,
    norm,
    norm_bias,
    z,
    position,
    speed,
    y,
    room,
    arrived,
    tail,
    tail_after,
    before,
    after,
    slots,
    mixed_b,
    key_b,
    value_b,
    beta_b,
    step_b,
    z_b,
    scale,
    unit_eps,
    beta_scale,
    divisor,
    least,
    most,
    norm_eps,
    normaliser_eps,
    HK: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    COLUMNS: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    ALL_V: tl.constexpr,
    HEADS: tl.constexpr,
    Q_AT: tl.constexpr,
    K_AT: tl.constexpr,
    V_AT: tl.constexpr,
    CONV_AT: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    WP: tl.constexpr,
    BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    STEPS: tl.constexpr,
    DELTA: tl.constexpr,
    DECAY: tl.constexpr,
    UNIT: tl.constexpr,
    ELU: tl.constexpr,
    TURNED: tl.constexpr,
    BONUS: tl.constexpr,
    CENTRE_BIAS: tl.constexpr,
    STEPPED: tl.constexpr,
    SKIP: tl.constexpr,
    NORM: tl.constexpr,
    GATE: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    START: tl.constexpr,
    TAIL: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Grid: (rows * HV * blocks of columns,). States ``[rows, HV, K, COLUMNS]``, tails ``[rows, W - 1, D]``; with SLOTS in slot ``slots[r]``, in place.

    room: float32 ``[rows, HV, COLUMNS]``; arrived: int32 ``[rows, HK]``, zeros, and zeros again at the end. DECAY, NORM, GATE: as numbered in
    ``triton/mixer.py``. COLUMNS: V, or one more for the normaliser. SPLIT: k and v are not in ``mixed``.
    """
    blocks: tl.constexpr = (COLUMNS + BV - 1) // BV
    HV: tl.constexpr = HK * GROUP
    program = tl.program_id(0).to(tl.int64)
    block = program % blocks
    head = program // blocks % HV
    row = program // blocks // HV
    key_head = head // GROUP
    if SLOTS:
        slot = tl.load(slots + row).to(tl.int64)
        live = slot >= 0
        slot = tl.maximum(slot, 0)
    else:
        slot = row
        live = row >= 0
    kk = tl.arange(0, BK)
    column = block * BV + tl.arange(0, BV)
    ok_k = kk < tl.where(live, K, 0)
    ok_v = column < tl.where(live, V, 0)
    ok_state = ok_k[:, None] & (column < tl.where(live, COLUMNS, 0))[None, :]
    state_at = (slot * HV + head) * (K * COLUMNS) + kk.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    mixed += row * mixed_b
    if TAIL:
        tail += slot * ((W - 1) * D)
    if W > 1:
        tail_after += slot * ((W - 1) * D)

    state = tl.zeros([BK, BV], tl.float32)
    if START:
        state = tl.load(before + state_at, mask=ok_state, other=0.0)
    q_at, k_at, v_at = Q_AT + key_head * K, K_AT + key_head * K, V_AT + head * V
    q_row = channels(mixed + q_at, tail, weight, bias, kk, ok_k, q_at - CONV_AT, D, W, BIAS, TAIL)
    if SPLIT:
        k_row = tl.load(key + row * key_b + key_head * K + kk, mask=ok_k, other=0.0).to(tl.float32)
        own = tl.load(value + row * value_b + head * V + column, mask=ok_v, other=0.0).to(tl.float32)
    else:
        k_row = channels(mixed + k_at, tail, weight, bias, kk, ok_k, k_at - CONV_AT, D, W, BIAS, TAIL)
        own = channels(mixed + v_at, tail, weight, bias, column, ok_v, v_at - CONV_AT, D, W, BIAS, TAIL)
    if ELU:
        q_row = tl.where(ok_k, elu_plus_one(q_row), 0.0)
        k_row = tl.where(ok_k, elu_plus_one(k_row), 0.0)
    if TURNED:  # channels i and i + K / 2, which are read again the other way round
        half: tl.constexpr = K // 2
        first = kk < half
        other = tl.where(first, kk + half, kk - half)
        ok_other = ok_k & (kk < 2 * half)
        turns = tl.load(position + row).to(tl.float64) * tl.load(
            speed + tl.where(first, kk, other), mask=ok_other, other=0.0
        )
        angle = ((turns - tl.floor(turns)) * 6.283185307179586).to(tl.float32)
        cos, sin = tl.cos(angle), tl.where(first, -tl.sin(angle), tl.sin(angle))
        q_other = tl.load(mixed + q_at + other, mask=ok_other, other=0.0).to(tl.float32)
        k_other = tl.load(mixed + k_at + other, mask=ok_other, other=0.0).to(tl.float32)
        q_row = q_row * cos + q_other * sin
        k_row = k_row * cos + k_other * sin
    if UNIT:
        q_row = q_row / tl.sqrt(tl.sum(q_row * q_row, axis=0) + unit_eps)
        k_row = k_row / tl.sqrt(tl.sum(k_row * k_row, axis=0) + unit_eps)
    written = own
    if COLUMNS > V:
        written = tl.where(column == V, 1.0, own)
    read = tl.zeros([BV], tl.float32)
    if BONUS:  # read before the token decays or writes anything, its own write weighted
        u = tl.load(bonus + head * K + kk, mask=ok_k, other=0.0).to(tl.float32)
        read = tl.sum((q_row * scale)[:, None] * state, axis=0)
        read += tl.sum(q_row * scale * u * k_row, axis=0) * written
    if DECAY == 1:
        taken = softplus(
            tl.load(step + row * step_b + head).to(tl.float32) + tl.load(step_bias + head).to(tl.float32)
        )
        taken = tl.minimum(tl.maximum(taken, least), most)
        state = state * tl.exp(-tl.exp(tl.load(rate + head).to(tl.float32)) * taken)
        if STEPPED:
            written = written * taken
    if DECAY >= 2:
        raw = tl.zeros([BK], tl.float32)
        if STEPS:
            raw = tl.load(step + row * step_b + key_head * K + kk, mask=ok_k, other=0.0).to(tl.float32)
        if DECAY == 2 or DECAY == 4:
            raw += tl.load(step_bias + key_head * K + kk, mask=ok_k, other=0.0).to(tl.float32)
        if DECAY == 2:
            log = -tl.exp(tl.load(rate + head).to(tl.float32)) * softplus(raw)
        elif DECAY == 3:
            log = log_sigmoid(raw) / divisor
        elif DECAY == 4:
            log = -tl.exp(raw)
        else:
            log = raw + tl.load(rate + head).to(tl.float32)
        state = state * tl.exp(log)[:, None]
    if DELTA:
        share = sigmoid(tl.load(beta + row * beta_b + head).to(tl.float32)) * beta_scale
        written = share * (written - tl.sum(k_row[:, None] * state, axis=0))
    state += k_row[:, None] * written[None, :]
    if not BONUS:
        read = tl.sum((q_row * scale)[:, None] * state, axis=0)
    if SKIP:
        read += tl.load(skip + head).to(tl.float32) * own
    tl.store(after + state_at, state, mask=ok_state)
    tl.store(room + (row * HV + head) * COLUMNS + column, read, mask=column < COLUMNS)

    tl.debug_barrier()  # all threads have written: one says so for all
    count = tl.atomic_add(arrived + row * HK + key_head, 1, sem="acq_rel")
    if count == GROUP * blocks - 1:
        tl.debug_barrier()
        tl.store(arrived + row * HK + key_head, 0)
        if GATE > 0:
            z += row * z_b + key_head * GROUP * V
        finish(
            room + (row * HV + key_head * GROUP) * COLUMNS,
            norm,
            norm_bias,
            key_head * GROUP * V,
            z,
            y + (row * HV + key_head * GROUP) * V,
            live,
            norm_eps,
            normaliser_eps,
            GROUP,
            V,
            COLUMNS,
            ALL_V,
            HEADS,
            NORM,
            CENTRE_BIAS,
            GATE,
            GATE_FIRST,
        )
        if W > 1:
            save_tail(mixed + q_at, 1, 0, kk, ok_k, tail, tail_after, q_at - CONV_AT, D, W, WP, TAIL)
            save_tail(mixed + k_at, 1, 0, kk, ok_k, tail, tail_after, k_at - CONV_AT, D, W, WP, TAIL)
            for begin in range(0, GROUP * V, ALL_V):
                cc = begin + tl.arange(0, ALL_V)
                ok_c = cc < tl.where(live, GROUP * V, 0)
                first = V_AT + key_head * GROUP * V
                save_tail(mixed + first, 1, 0, cc, ok_c, tail, tail_after, first - CONV_AT, D, W, WP, TAIL)


@triton.jit
def finish(
    out,
    norm,
    norm_bias,
    norm_at,
    z,
    y,
    live,
    norm_eps,
    normaliser_eps,
    GROUP: tl.constexpr,
    V: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALL_V: tl.constexpr,
    HEADS: tl.constexpr,
    NORM: tl.constexpr,
    CENTRE_BIAS: tl.constexpr,
    GATE: tl.constexpr,
    GATE_FIRST: tl.constexpr,
):
    """``[GROUP, V]``, HEADS heads at a time: the normaliser, the norm (1 of a head, 2 of all, 3 of a head to mean 0), the gate."""
    vv = tl.arange(0, ALL_V)
    hh = tl.arange(0, HEADS)
    squares = 0.0
    if NORM == 2:
        for begin in range(0, GROUP, HEADS):
            o, _, _, _ = load_heads(out, z, begin + hh, vv, live, GROUP, V, COLUMNS, GATE, GATE_FIRST)
            squares += tl.sum(tl.sum(o * o, axis=1), axis=0)
    for begin in range(0, GROUP, HEADS):
        o, gate, at, ok = load_heads(out, z, begin + hh, vv, live, GROUP, V, COLUMNS, GATE, GATE_FIRST)
        if COLUMNS > V:
            sums = tl.load(
                out + (begin + hh) * COLUMNS + V, mask=begin + hh < GROUP, other=1.0, cache_modifier=".cg"
            )
            o = o / (sums + normaliser_eps)[:, None]
        if NORM == 3:
            o = tl.where(ok, o - (tl.sum(o, axis=1) / V)[:, None], 0.0)
        if NORM == 1 or NORM == 3:
            o = o / tl.sqrt(tl.sum(o * o, axis=1) / V + norm_eps)[:, None]
        if NORM == 1:
            o = o * tl.load(norm + vv, mask=vv < V, other=0.0).to(tl.float32)[None, :]
        if NORM == 2:
            o = o / tl.sqrt(squares / (GROUP * V) + norm_eps)
        if NORM > 1:
            o = o * tl.load(norm + norm_at + at, mask=ok, other=0.0).to(tl.float32)
        if CENTRE_BIAS:
            o += tl.load(norm_bias + norm_at + at, mask=ok, other=0.0).to(tl.float32)
        if not GATE_FIRST:
            o = opened(o, gate, GATE)
        save(y + at, tl.where(live, o, 0.0), ok)


@triton.jit
def load_heads(
    out,
    z,
    heads,
    vv,
    live,
    GROUP: tl.constexpr,
    V: tl.constexpr,
    COLUMNS: tl.constexpr,
    GATE: tl.constexpr,
    GATE_FIRST: tl.constexpr,
):
    """Outputs (behind the gate, where that is first), gates, their places, and which there are."""
    at = heads[:, None] * V + vv[None, :]
    ok = (heads < GROUP)[:, None] & (vv < V)[None, :]
    o = tl.load(out + heads[:, None] * COLUMNS + vv[None, :], mask=ok, other=0.0, cache_modifier=".cg")
    gate = o
    if GATE > 0:
        there = (heads < tl.where(live, GROUP, 0))[:, None] & (vv < V)[None, :]
        gate = tl.load(z + at, mask=there, other=0.0).to(tl.float32)
    if GATE_FIRST:
        o = opened(o, gate, GATE)
    return o, gate, at, ok


@triton.jit(do_not_specialize=["count", "tokens", "eps"])
def norm_gate(
    o,
    norm,
    norm_bias,
    z,
    y,
    count,
    tokens,
    z_b,
    z_t,
    eps,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    CENTRED: tl.constexpr,
    BIAS: tl.constexpr,
    GATE: tl.constexpr,
    GATE_FIRST: tl.constexpr,
):
    """Behind many tokens: rows of SIZE channels, GROUPS to a token, ROWS to a program. WIDE: the weight has GROUPS * SIZE channels, else SIZE.

    Grid: (count / ROWS,). o and y ``[B, T, GROUPS * SIZE]`` without gaps.
    """
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    ok = (r < count)[:, None] & (c < SIZE)[None, :]
    group, token = r % GROUPS, r // GROUPS
    out = tl.load(o + r[:, None] * SIZE + c[None, :], mask=ok, other=0.0).to(tl.float32)
    gate = out
    if GATE > 0:
        at = token // tokens * z_b + token % tokens * z_t + group * SIZE
        gate = tl.load(z + at[:, None] + c[None, :], mask=ok, other=0.0).to(tl.float32)
    if GATE_FIRST:
        out = opened(out, gate, GATE)
    if CENTRED:
        out = tl.where(ok, out - (tl.sum(out, axis=1) / SIZE)[:, None], 0.0)
    out = out / tl.sqrt(tl.sum(out * out, axis=1) / SIZE + eps)[:, None]
    if WIDE:
        out = out * tl.load(norm + group[:, None] * SIZE + c[None, :], mask=ok, other=0.0).to(tl.float32)
    else:
        out = out * tl.load(norm + c, mask=c < SIZE, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        out += tl.load(norm_bias + group[:, None] * SIZE + c[None, :], mask=ok, other=0.0).to(tl.float32)
    if not GATE_FIRST:
        out = opened(out, gate, GATE)
    save(y + r[:, None] * SIZE + c[None, :], out, ok)
