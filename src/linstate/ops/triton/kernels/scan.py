"""The elementwise scan, token by token: every entry of the state has a decay of its own, so there is nothing for matmuls to do.

A program has one sequence (or a segment of it), one head and BV columns; its state ``[K, BV]`` and the rates stay in registers.
Without q and k (READS false) K is one. ``loop_unroll_factor`` lets loads of later tokens go out before they are needed.
"""

import triton
import triton.language as tl

from linstate.ops.triton.kernels.chunk import save


@triton.jit
def line(base, at, ok):
    return tl.load(base + at, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def factor(gate, rates, RATES: tl.constexpr):
    """``exp(g A)``, or ``exp(g)`` for every k: ``[K, V]`` or ``[1, V]``."""
    if RATES:
        return tl.exp(gate[None, :] * rates)
    else:
        return tl.exp(gate)[None, :]


@triton.jit(do_not_specialize=["tokens", "segment", "segments", "every", "keep_rows", "scale"])
def scan(
    q,
    k,
    v,
    g,
    rates_of,
    o,
    start,
    after,
    kept,
    transition,
    bounds,
    kept_base,
    slots,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    g_b,
    g_t,
    g_h,
    tokens,
    segment,
    segments,
    every,
    keep_rows,
    scale,
    HV: tl.constexpr,
    Q_GROUP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    READS: tl.constexpr,
    RATES: tl.constexpr,
    START: tl.constexpr,
    PACKED: tl.constexpr,
    KEEP: tl.constexpr,
    SUMMARY: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Grid: (rows * HV * segments * blocks of columns,). SUMMARY: H into ``after``, the decays of a segment ``[K, V]`` into
    ``transition``, no o. SLOTS: as in ``step``, states in place."""
    blocks: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0).to(tl.int64)
    block = program % blocks
    program = program // blocks
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
    zero = tl.zeros_like(row)  # of 64 bits
    kk = tl.arange(0, BK)
    column = block * BV + tl.arange(0, BV)
    ok_k, ok_v = kk < K, column < V
    live = ok_v
    slot = row
    if SLOTS:
        slot = tl.load(slots + row).to(tl.int64)
        live = column < tl.where(slot >= 0, V, 0)
    ok_state = ok_k[:, None] & live[None, :]
    state_at = kk.to(tl.int64)[:, None] * V + column[None, :]
    own = (row * segments + part) * HV + head
    in_slot = slot * HV + head

    v += batch * v_b + first * v_t + head * v_h
    g += batch * g_b + first * g_t + head * g_h
    if READS:
        q += batch * q_b + first * q_t + head // Q_GROUP * q_h
        k += batch * k_b + first * k_t + head // Q_GROUP * k_h
    if not SUMMARY:
        o += ((batch * tokens + first) * HV + head) * V
    rates = tl.zeros([BK, BV], tl.float32)
    if RATES:
        rates = tl.load(rates_of + head * (K * V) + state_at, mask=ok_k[:, None] & ok_v[None, :], other=0.0)
        rates = rates.to(tl.float32)
    state = tl.zeros([BK, BV], tl.float32)
    if START:
        if SLOTS:
            state = tl.load(start + in_slot * (K * V) + state_at, mask=ok_state, other=0.0)
        else:
            state = tl.load(start + own * (K * V) + state_at, mask=ok_state, other=0.0)
    passed = tl.zeros([BV], tl.float32)
    for at in tl.range(begin, end, loop_unroll_factor=4):
        t = zero + at
        gate = line(g + t * g_t, column, ok_v)
        value = line(v + t * v_t, column, ok_v)[None, :]
        if READS:
            value = value * line(k + t * k_t, kk, ok_k)[:, None]
        state = factor(gate, rates, RATES) * state + value
        if SUMMARY:
            passed += gate
        else:
            if READS:
                seen = tl.sum(state * line(q + t * q_t, kk, ok_k)[:, None], axis=0)
            else:
                seen = tl.sum(state, axis=0)
            save(o + t * (HV * V) + column, tl.where(live, seen * scale, 0.0), ok_v)
        if KEEP:
            done = at + 1
            if done % every == 0:
                if PACKED:
                    base = tl.load(kept_base + row).to(tl.int64)
                else:
                    base = row * keep_rows
                save(kept + ((base + done // every - 1) * HV + head) * (K * V) + state_at, state, ok_state)
    if SUMMARY:
        tl.store(after + own * (K * V) + state_at, state, mask=ok_state)
        decayed = factor(passed, rates, RATES) + tl.zeros([BK, BV], tl.float32)
        tl.store(transition + own * (K * V) + state_at, decayed, mask=ok_state)
    elif part == last_part:
        tl.store(after + in_slot * (K * V) + state_at, state, mask=ok_state)


@triton.jit(do_not_specialize=["tokens", "every", "keep_rows", "scale"])
def scan_gradients(
    q,
    k,
    v,
    g,
    rates_of,
    do,
    start,
    kept,
    end_state,
    scratch,
    dq,
    dk,
    dv,
    dg,
    drates,
    dstart,
    bounds,
    kept_base,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    g_b,
    g_t,
    g_h,
    do_b,
    do_t,
    do_h,
    total,
    tokens,
    every,
    keep_rows,
    scale,
    HV: tl.constexpr,
    Q_GROUP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    READS: tl.constexpr,
    RATES: tl.constexpr,
    START: tl.constexpr,
    PACKED: tl.constexpr,
):
    """All gradients of the scan, the last span of ``every`` tokens first. Grid: (rows * HV * blocks of columns,).

    The states of a span are made again into ``scratch [programs, every, BK, BV]``, which stays in the second-level cache, and read backwards.
    dq and dk are ``[blocks, B, T, HV, K]``: a sum over the blocks is left (``total`` is B T); drates ``[rows, HV, K, V]``.
    """
    blocks: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0).to(tl.int64)
    scratch += program * every * (BK * BV)
    block = program % blocks
    head = program // blocks % HV
    row = program // blocks // HV
    if PACKED:
        first = tl.load(bounds + row).to(tl.int64)
        length = (tl.load(bounds + row + 1).to(tl.int64) - first).to(tl.int32)
        batch = tl.zeros_like(row)
        base = tl.load(kept_base + row).to(tl.int64)
    else:
        first = tl.zeros_like(row)
        length = tokens
        batch = row
        base = row * keep_rows
    zero = tl.zeros_like(row)  # of 64 bits
    kk = tl.arange(0, BK)
    column = block * BV + tl.arange(0, BV)
    ok_k, ok_v = kk < K, column < V
    ok_state = ok_k[:, None] & ok_v[None, :]
    state_at = kk.to(tl.int64)[:, None] * V + column[None, :]
    scratch_at = kk[:, None] * BV + tl.arange(0, BV)[None, :]

    v += batch * v_b + first * v_t + head * v_h
    g += batch * g_b + first * g_t + head * g_h
    do += batch * do_b + first * do_t + head * do_h
    if READS:
        q += batch * q_b + first * q_t + head // Q_GROUP * q_h
        k += batch * k_b + first * k_t + head // Q_GROUP * k_h
    token = batch * tokens + first
    rates = tl.zeros([BK, BV], tl.float32)
    of_rates = tl.zeros([BK, BV], tl.float32)
    if RATES:
        rates = tl.load(rates_of + head * (K * V) + state_at, mask=ok_state, other=0.0).to(tl.float32)
    place = (row * HV + head) * (K * V) + state_at
    dstate = tl.load(end_state + place, mask=ok_state, other=0.0).to(tl.float32)
    spans = (length + every - 1) // every
    for back in range(0, spans):
        span = spans - 1 - back
        begin = span * every
        end = tl.minimum(begin + every, length)
        state = tl.zeros([BK, BV], tl.float32)
        if span > 0:
            where = kept + ((base + span - 1) * HV + head) * (K * V) + state_at
            state = tl.load(where, mask=ok_state, other=0.0)
        elif START:
            state = tl.load(start + place, mask=ok_state, other=0.0)
        for at in range(begin, end):
            t = zero + at
            tl.store(scratch + (at - begin) * (BK * BV) + scratch_at, state)
            value = line(v + t * v_t, column, ok_v)[None, :]
            if READS:
                value = value * line(k + t * k_t, kk, ok_k)[:, None]
            state = factor(line(g + t * g_t, column, ok_v), rates, RATES) * state + value
        tl.debug_barrier()
        for behind in range(0, end - begin):
            at = end - 1 - behind
            t = zero + at
            state = tl.load(scratch + (at - begin) * (BK * BV) + scratch_at)
            gate = line(g + t * g_t, column, ok_v)
            value = line(v + t * v_t, column, ok_v)
            seen = line(do + t * do_t, column, ok_v) * scale
            decay = factor(gate, rates, RATES)
            here = token + t
            if READS:
                q_line = line(q + t * q_t, kk, ok_k)
                k_line = line(k + t * k_t, kk, ok_k)
                written = k_line[:, None] * value[None, :]
                dstate += q_line[:, None] * seen[None, :]
                at_k = ((block * total + here) * HV + head) * K + kk
                save(dq + at_k, tl.sum((decay * state + written) * seen[None, :], axis=1), ok_k)
                save(dk + at_k, tl.sum(dstate * value[None, :], axis=1), ok_k)
                dvalue = tl.sum(dstate * k_line[:, None], axis=0)
            else:
                dstate += seen[None, :] + tl.zeros([BK, BV], tl.float32)
                dvalue = tl.sum(dstate, axis=0)
            dstate = dstate * decay
            dlog = dstate * state
            if RATES:
                of_rates += dlog * gate[None, :]
                dlog = dlog * rates
            at_v = (here * HV + head) * V + column
            save(dv + at_v, dvalue, ok_v)
            save(dg + at_v, tl.sum(dlog, axis=0), ok_v)
        tl.debug_barrier()
    tl.store(dstart + place, dstate, mask=ok_state)
    if RATES:
        tl.store(drates + place, of_rates, mask=ok_state)
