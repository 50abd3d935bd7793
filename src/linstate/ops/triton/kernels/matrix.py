"""Forward of the recurrences on a matrix state: the whole chunk loop of a head in one launch, the state in registers.

A program has one sequence (or one segment of it), one head and BV value columns. It reads q, k, v and the gates of a chunk,
and writes o; w, u, scores and the states between chunks are never in memory, unless states are asked for (KEEP).

SUMMARY: no o; instead what the segment does to a state, ``S -> P S + H``: H from an empty state, and, in programs of their
own, P from the identity with nothing written. In linear attention P is a vector of K decays.

FUSED: q, k and v are channels of a mixer's projection before its convolution, g and beta before their activations; what a mixer does
with them is done in passing (``kernels/gates.py``). Else its arguments are None and its constants zero. Diagonal plus low rank is RWKV-7's then
(``kernels/rwkv.py``): a has the rates as projected, weight and bias are k_k and k_a, log_rate and step_bias (with STEPPED) what mixes v and
the first layer's v.
"""

import triton
import triton.language as tl

from linstate.ops.triton.kernels.chunk import (
    diagonal,
    from_start,
    load_gate,
    load_line,
    load_rows,
    mm,
    mm_fine,
    save,
    scores,
    split,
    to_end,
    unit_lower_inverse,
    whole,
)
from linstate.ops.triton.kernels.gates import (
    load_convolved,
    log_sigmoid,
    save_tail,
    sigmoid,
    softplus,
    unit_length,
)
from linstate.ops.triton.kernels.rwkv import in_type_of, load_channels, log_decay, made


@triton.jit(
    do_not_specialize=[
        "tokens",
        "segment",
        "segments",
        "every",
        "keep_rows",
        "scale",
        "unit_eps",
        "beta_scale",
        "divisor",
        "least",
        "most",
    ],
)
def forward(
    q,
    k,
    v,
    a,
    b,
    beta,
    g,
    bonus,
    o,
    start,
    after,
    kept,
    transition,
    bounds,
    kept_base,
    weight,
    bias,
    tail,
    tail_after,
    log_rate,
    step_bias,
    skip,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    a_b,
    a_t,
    a_h,
    b_b,
    b_t,
    b_h,
    beta_b,
    beta_t,
    beta_h,
    g_b,
    g_t,
    g_h,
    tokens,
    segment,
    segments,
    every,
    keep_rows,
    scale,
    unit_eps,
    beta_scale,
    divisor,
    least,
    most,
    HV: tl.constexpr,
    Q_GROUP: tl.constexpr,
    G_GROUP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    KIND: tl.constexpr,
    GATE: tl.constexpr,
    BONUS: tl.constexpr,
    START: tl.constexpr,
    PACKED: tl.constexpr,
    KEEP: tl.constexpr,
    SUMMARY: tl.constexpr,
    FUSED: tl.constexpr,
    W: tl.constexpr,
    WP: tl.constexpr,
    D: tl.constexpr,
    Q_AT: tl.constexpr,
    K_AT: tl.constexpr,
    V_AT: tl.constexpr,
    BIAS: tl.constexpr,
    TAIL: tl.constexpr,
    DECAY: tl.constexpr,
    OFFSET: tl.constexpr,
    UNIT: tl.constexpr,
    STEPPED: tl.constexpr,
    SKIP: tl.constexpr,
    DT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """See the module. Grid: (rows * HV * segments * blocks of columns,); strides of batch, time and head in elements."""
    blocks: tl.constexpr = (V + BV - 1) // BV
    of_state: tl.constexpr = (K + BV - 1) // BV if SUMMARY and KIND > 0 else 0
    program = tl.program_id(0).to(tl.int64)
    block = program % (blocks + of_state)
    program = program // (blocks + of_state)
    part = program % segments
    program = program // segments
    head = program % HV
    row = program // HV
    if PACKED:
        first = tl.load(bounds + row).to(tl.int64)
        length = (tl.load(bounds + row + 1).to(tl.int64) - first).to(tl.int32)
        batch = tl.zeros_like(row)
    else:
        first = tl.zeros_like(row)
        length = tokens
        batch = row
    begin = (part * segment).to(tl.int32)
    end = tl.minimum(begin + segment, length)
    last_part = tl.maximum((length + segment - 1) // segment, 1) - 1

    i = tl.arange(0, C)
    kk = tl.arange(0, BK)
    column = block * BV + tl.arange(0, BV)
    ok_k = kk < K
    ok_v = column < V
    writes = ok_v  # the columns that have values
    if of_state > 0:
        identity = block >= blocks  # these programs carry P
        column = tl.where(identity, column - blocks * BV, column)
        ok_v = column < tl.where(identity, K, V)
        writes = column < tl.where(identity, 0, V)

    q += batch * q_b + first * q_t + head // Q_GROUP * q_h
    k += batch * k_b + first * k_t + head // Q_GROUP * k_h
    v += batch * v_b + first * v_t + head * v_h
    if KIND == 2:
        a += batch * a_b + first * a_t + head // Q_GROUP * a_h
        b += batch * b_b + first * b_t + head // Q_GROUP * b_h
    if KIND == 1:
        beta += batch * beta_b + first * beta_t + head * beta_h
    if GATE > 0:
        g += batch * g_b + first * g_t + head // G_GROUP * g_h
    if not SUMMARY:
        o += ((batch * tokens + first) * HV + head) * V

    if FUSED and KIND == 2 and STEPPED:
        log_rate += batch * v_b + first * v_t + head * v_h
        step_bias += batch * v_b + first * v_t + head * v_h
    of_q, of_k, of_v = Q_AT + head // Q_GROUP * K, K_AT + head // Q_GROUP * K, V_AT + head * V
    if W > 1:
        tail_after += row * ((W - 1) * D)
        if TAIL:
            tail += row * ((W - 1) * D)
    if DECAY == 1 or DECAY == 2:
        speed = -tl.exp(tl.load(log_rate + head).to(tl.float32))
    if DECAY == 1:
        offset = tl.load(step_bias + head).to(tl.float32)
    if DECAY >= 2:
        offset = tl.zeros([1, BK], tl.float32)
    if DECAY >= 2 and OFFSET:
        offset = tl.load(step_bias + head // Q_GROUP * K + kk, mask=ok_k, other=0.0).to(tl.float32)[None, :]

    # states are [rows * segments, HV, K, V], those after a sequence [rows, HV, K, V]
    state_at = kk.to(tl.int64)[:, None] * V + column[None, :]
    ok_state = ok_k[:, None] & ok_v[None, :]
    own = (row * segments + part) * HV + head
    state = tl.zeros([BK, BV], tl.float32)
    if SUMMARY:
        if KIND == 0:
            decayed = tl.full([BK, 1], 1.0, tl.float32)
        else:
            state += tl.where(kk[:, None] == tl.where(identity, column, -1)[None, :], 1.0, 0.0)
    elif START:
        state = tl.load(start + own * (K * V) + state_at, mask=ok_state, other=0.0).to(tl.float32)
    if BONUS:
        u = tl.load(bonus + head * K + kk, mask=ok_k, other=0.0).to(tl.float32)[None, :]

    for at in range(begin, end, C):
        t = at + i
        ok_t = t < end
        if W > 0:
            k_tile = load_convolved(k, t, k_t, kk, ok_t, ok_k, tail, weight, bias, of_k, D, W, BIAS, TAIL)
            v_tile = load_convolved(
                v, t, v_t, column, ok_t, writes, tail, weight, bias, of_v, D, W, BIAS, TAIL
            )
        else:
            k_tile = load_rows(k, t, k_t, kk, ok_t, ok_k)
            v_tile = load_rows(v, t, v_t, column, ok_t, writes)
        if UNIT:
            k_tile = unit_length(k_tile, unit_eps)
        q_tile = k_tile
        if not SUMMARY:
            if W > 0:
                q_tile = load_convolved(q, t, q_t, kk, ok_t, ok_k, tail, weight, bias, of_q, D, W, BIAS, TAIL)
            else:
                q_tile = load_rows(q, t, q_t, kk, ok_t, ok_k)
            if UNIT:
                q_tile = unit_length(q_tile, unit_eps)
        r_tile = k_tile
        a_tile = k_tile
        if KIND == 2:
            a_tile = load_rows(a, t, a_t, kk, ok_t, ok_k)
            if FUSED:
                key = head // Q_GROUP
                kappa, removed, kept_key = made(
                    k_tile,
                    a_tile,
                    load_channels(weight, key, kk, K),
                    load_channels(bias, key, kk, K),
                    unit_eps,
                )
                r_tile, a_tile, k_tile = (
                    in_type_of(kappa, k_tile),
                    in_type_of(removed, k_tile),
                    in_type_of(kept_key, k_tile),
                )
                if STEPPED:
                    share = sigmoid(load_rows(log_rate, t, v_t, column, ok_t, writes).to(tl.float32))
                    other = load_rows(step_bias, t, v_t, column, ok_t, writes).to(tl.float32)
                    v_wide = v_tile.to(tl.float32)
                    v_tile = in_type_of(v_wide + (other - v_wide) * share, v_tile)
            else:
                r_tile = load_rows(b, t, b_t, kk, ok_t, ok_k)
        gate = tl.zeros([C], tl.float32)
        passed = v_tile
        if FUSED:
            if KIND == 2:
                gate = log_decay(load_rows(g, t, g_t, kk, ok_t, ok_k))
                gate = tl.where(ok_t[:, None] & ok_k[None, :], gate, 0.0)
            if DECAY == 1:
                taken = softplus(load_line(g, t, g_t, ok_t) + offset)
                taken = tl.where(ok_t, tl.minimum(tl.maximum(taken, least), most), 0.0)
                gate = tl.maximum(speed * taken, -1e5)
                if STEPPED:
                    v_tile = in_type_of(v_tile.to(tl.float32) * taken[:, None], v_tile)
            if DECAY == 2:
                gate = speed * softplus(load_rows(g, t, g_t, kk, ok_t, ok_k).to(tl.float32) + offset)
            if DECAY == 3:
                gate = log_sigmoid(load_rows(g, t, g_t, kk, ok_t, ok_k).to(tl.float32)) / divisor
            if DECAY == 4:
                gate = -tl.exp(load_rows(g, t, g_t, kk, ok_t, ok_k).to(tl.float32) + offset)
            if DECAY > 1:
                gate = tl.where(ok_t[:, None] & ok_k[None, :], tl.maximum(gate, -1e5), 0.0)
        elif GATE > 0:
            gate = load_gate(g, t, g_t, kk, ok_t, ok_k, GATE)
        high, middle, low = split(gate)

        if KIND > 0 or not SUMMARY:
            qk, rk, qa, ra = scores(
                q_tile,
                r_tile,
                k_tile,
                a_tile,
                gate,
                high,
                middle,
                low,
                i,
                KIND,
                GATE,
                BONUS,
                C,
                LEVELS,
                DT,
                PRECISION,
            )
        written = v_tile  # what k writes
        if KIND == 1:
            rate = load_line(beta, t, beta_t, ok_t)
            if FUSED:
                rate = tl.where(ok_t, sigmoid(rate) * beta_scale, 0.0)
            rate = rate[:, None]
            rows = r_tile * from_start(gate, high, middle, low, i, GATE, False)
            solve = unit_lower_inverse(rate * rk, i, LEVELS, DT, PRECISION)
            written = mm_fine(solve, rate * (v_tile - mm_fine(rows, state, DT, PRECISION)), DT, PRECISION)
        if KIND == 2:
            rows = r_tile * from_start(gate, high, middle, low, i, GATE, True)
            solve = unit_lower_inverse(-ra, i, LEVELS, DT, PRECISION)
            asked = mm(rows, state, DT, PRECISION) + mm(rk, v_tile, DT, PRECISION)
            found = mm_fine(solve, asked, DT, PRECISION)  # what a writes

        if not SUMMARY:
            if BONUS:
                qk += diagonal(q_tile * u, k_tile, i)
            else:
                qk += diagonal(q_tile, k_tile, i)
            seen = mm(q_tile * from_start(gate, high, middle, low, i, GATE, BONUS), state, DT, PRECISION)
            seen += mm(qk, written, DT, PRECISION)
            if KIND == 2:
                seen += mm(qa + diagonal(q_tile, a_tile, i), found, DT, PRECISION)
            seen = seen * scale
            if SKIP:
                seen += tl.load(skip + head).to(tl.float32) * passed.to(tl.float32)
            place = o + t.to(tl.int64)[:, None] * (HV * V) + column[None, :]
            save(place, seen, ok_t[:, None] & ok_v[None, :])

        ending = to_end(gate, high, middle, low, i, GATE)
        total = whole(gate, GATE)
        state = state * total + mm(tl.trans(k_tile * ending), written, DT, PRECISION)
        if KIND == 2:
            state += mm(tl.trans(a_tile * ending), found, DT, PRECISION)
        if SUMMARY and KIND == 0:
            decayed = decayed * total
        if KEEP:
            done = at + C
            if done % every == 0 and done <= length:
                if PACKED:
                    base = tl.load(kept_base + row).to(tl.int64)
                else:
                    base = row * keep_rows
                snapshot = kept + ((base + done // every - 1) * HV + head) * (K * V) + state_at
                save(snapshot, state, ok_state)

    if SUMMARY:
        if of_state > 0:
            if identity:
                of_p = transition + own * (K * K) + kk.to(tl.int64)[:, None] * K + column[None, :]
                tl.store(of_p, state, mask=ok_state)
            else:
                tl.store(after + own * (K * V) + state_at, state, mask=ok_state)
        else:
            tl.store(after + own * (K * V) + state_at, state, mask=ok_state)
            if block == 0:
                of_decays = transition + own * K + kk.to(tl.int64)
                tl.store(of_decays[:, None], decayed, mask=ok_k[:, None])
    elif part == last_part:
        tl.store(after + (row * HV + head) * (K * V) + state_at, state, mask=ok_state)
        if W > 1:
            save_tail(v, length, v_t, column, ok_v, tail, tail_after, of_v, D, W, WP, TAIL)
            if block == 0 and head % Q_GROUP == 0:
                save_tail(q, length, q_t, kk, ok_k, tail, tail_after, of_q, D, W, WP, TAIL)
                save_tail(k, length, k_t, kk, ok_k, tail, tail_after, of_k, D, W, WP, TAIL)


@triton.jit(do_not_specialize=["tokens", "segment", "segments"])
def combine(
    increments,
    transition,
    start,
    starts,
    bounds,
    tokens,
    segment,
    segments,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PART: tl.constexpr,
    TRANSITION: tl.constexpr,
    START: tl.constexpr,
    PACKED: tl.constexpr,
    BACKWARD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The state before every segment, from their summaries; BACKWARD: from the last to the first. Grid: (rows * HV * blocks,).

    TRANSITION: P is 0 a factor for each entry of the state, 1 for each k, 2 a matrix.

    ``P S`` reads S back from where it was just stored, PART rows at a time: P of K = 256 would not fit on chip.
    """
    blocks: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0).to(tl.int64)
    block = program % blocks
    head = program // blocks % HV
    row = program // blocks // HV
    length = tokens
    if PACKED:
        length = (tl.load(bounds + row + 1) - tl.load(bounds + row)).to(tl.int32)
    count = tl.maximum((length + segment - 1) // segment, 1)
    kk = tl.arange(0, BK)
    column = block * BV + tl.arange(0, BV)
    ok_k, ok_v = kk < K, column < V
    ok_state = ok_k[:, None] & ok_v[None, :]
    state_at = kk.to(tl.int64)[:, None] * V + column[None, :]
    state = tl.zeros([BK, BV], tl.float32)
    if START:
        state = tl.load(start + (row * HV + head) * (K * V) + state_at, mask=ok_state, other=0.0).to(
            tl.float32
        )
    for number in range(0, count):
        if BACKWARD:
            part = count - 1 - number
        else:
            part = number
        own = (row * segments + part) * HV + head
        tl.store(starts + own * (K * V) + state_at, state, mask=ok_state)
        increment = tl.load(increments + own * (K * V) + state_at, mask=ok_state, other=0.0)
        if TRANSITION == 2:
            tl.debug_barrier()  # what other threads stored is read back
            for inner in tl.static_range(0, BK, PART):
                jj = inner + tl.arange(0, PART)
                left = tl.load(
                    transition + own * (K * K) + kk.to(tl.int64)[:, None] * K + jj[None, :],
                    mask=ok_k[:, None] & (jj < K)[None, :],
                    other=0.0,
                )
                right = tl.load(
                    starts + own * (K * V) + jj.to(tl.int64)[:, None] * V + column[None, :],
                    mask=(jj < K)[:, None] & ok_v[None, :],
                    other=0.0,
                )
                increment += tl.dot(left, right, input_precision=PRECISION)
            state = increment
        elif TRANSITION == 1:
            decayed = tl.load(transition + own * K + kk.to(tl.int64), mask=ok_k, other=0.0)
            state = decayed[:, None] * state + increment
        else:
            state = (
                tl.load(transition + own * (K * V) + state_at, mask=ok_state, other=0.0) * state + increment
            )
