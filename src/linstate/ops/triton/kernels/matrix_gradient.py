"""Gradients of the recurrences on a matrix state.

``sweep`` goes from the last chunk to the first with the gradient of the state, as ``forward`` goes from the first to the last with the
state, and writes dv and the gradient of the state behind every chunk. ``gradients`` then takes every chunk by itself, from the state
before it and the gradient of the state behind it. Nothing else of forward is kept: scores and the triangular inverse are made again.

SUMMARY, as in forward: what a segment does to the gradient of the state behind it.
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
    scores_gradient,
    split,
    sums,
    to_end,
    unit_lower_inverse,
    whole,
)


@triton.jit(do_not_specialize=["tokens", "segment", "segments", "per_row", "scale"])
def sweep(
    q,
    k,
    a,
    b,
    beta,
    g,
    bonus,
    do,
    dv,
    end_states,
    kept,
    dstart,
    transition,
    bounds,
    base_of,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
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
    do_b,
    do_t,
    do_h,
    tokens,
    segment,
    segments,
    per_row,
    scale,
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
    PACKED: tl.constexpr,
    SUMMARY: tl.constexpr,
    DT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """See the module. Grid: (rows * HV * segments * blocks of columns,).

    ``end_states``: the gradient of the state behind a segment ``[rows * segments, HV, K, V]``. ``kept``: behind every chunk.
    """
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

    i = tl.arange(0, C)
    kk = tl.arange(0, BK)
    column = block * BV + tl.arange(0, BV)
    ok_k = kk < K
    ok_v = column < V
    reads = ok_v
    if of_state > 0:
        identity = block >= blocks
        column = tl.where(identity, column - blocks * BV, column)
        ok_v = column < tl.where(identity, K, V)
        reads = column < tl.where(identity, 0, V)

    q += batch * q_b + first * q_t + head // Q_GROUP * q_h
    k += batch * k_b + first * k_t + head // Q_GROUP * k_h
    if KIND == 2:
        a += batch * a_b + first * a_t + head // Q_GROUP * a_h
        b += batch * b_b + first * b_t + head // Q_GROUP * b_h
    if KIND == 1:
        beta += batch * beta_b + first * beta_t + head * beta_h
    if GATE > 0:
        g += batch * g_b + first * g_t + head // G_GROUP * g_h
    do += batch * do_b + first * do_t + head * do_h
    dv += ((batch * tokens + first) * HV + head) * V

    state_at = kk.to(tl.int64)[:, None] * V + column[None, :]
    ok_state = ok_k[:, None] & ok_v[None, :]
    own = (row * segments + part) * HV + head
    dstate = tl.zeros([BK, BV], tl.float32)
    if SUMMARY:
        if KIND == 0:
            decayed = tl.full([BK, 1], 1.0, tl.float32)
        else:
            dstate += tl.where(kk[:, None] == tl.where(identity, column, -1)[None, :], 1.0, 0.0)
    else:
        dstate = tl.load(end_states + own * (K * V) + state_at, mask=ok_state, other=0.0).to(tl.float32)
    if BONUS:
        u = tl.load(bonus + head * K + kk, mask=ok_k, other=0.0).to(tl.float32)[None, :]
    if not SUMMARY:
        if PACKED:
            base = tl.load(base_of + row).to(tl.int64)
        else:
            base = row * per_row

    count = tl.maximum((end - begin + C - 1) // C, 0)
    for back in range(0, count):
        at = begin + (count - 1 - back) * C
        t = at + i
        ok_t = t < end
        q_tile = load_rows(q, t, q_t, kk, ok_t, ok_k)
        k_tile = load_rows(k, t, k_t, kk, ok_t, ok_k)
        do_tile = load_rows(do, t, do_t, column, ok_t, reads)
        r_tile = k_tile
        a_tile = k_tile
        if KIND == 2:
            a_tile = load_rows(a, t, a_t, kk, ok_t, ok_k)
            r_tile = load_rows(b, t, b_t, kk, ok_t, ok_k)
        gate = tl.zeros([C], tl.float32)
        if GATE > 0:
            gate = load_gate(g, t, g_t, kk, ok_t, ok_k, GATE)
        high, middle, low = split(gate)
        if not SUMMARY:
            save(kept + ((base + at // C) * HV + head) * (K * V) + state_at, dstate, ok_state)

        ending = to_end(gate, high, middle, low, i, GATE)
        total = whole(gate, GATE)
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
            if BONUS:
                qk += diagonal(q_tile * u, k_tile, i)
            else:
                qk += diagonal(q_tile, k_tile, i)
            # by what k writes: u in the delta rule, else v
            dwritten = mm(tl.trans(qk), do_tile, DT, PRECISION) * scale
            dwritten += mm(k_tile * ending, dstate, DT, PRECISION)
            if KIND == 2:
                qa += diagonal(q_tile, a_tile, i)
                dfound = mm(tl.trans(qa), do_tile, DT, PRECISION) * scale
                dfound += mm(a_tile * ending, dstate, DT, PRECISION)
                solve = unit_lower_inverse(-ra, i, LEVELS, DT, PRECISION)
                dasked = mm_fine(tl.trans(solve), dfound, DT, PRECISION)
                dwritten += mm(tl.trans(rk), dasked, DT, PRECISION)
        rows = q_tile * from_start(gate, high, middle, low, i, GATE, BONUS)
        dstate = dstate * total + mm(tl.trans(rows), do_tile, DT, PRECISION) * scale
        if KIND == 1:
            rate = load_line(beta, t, beta_t, ok_t)[:, None]
            solve = unit_lower_inverse(rate * rk, i, LEVELS, DT, PRECISION)
            dwritten = rate * mm_fine(tl.trans(solve), dwritten, DT, PRECISION)
            rows = r_tile * from_start(gate, high, middle, low, i, GATE, False)
            dstate -= mm(tl.trans(rows), dwritten, DT, PRECISION)
        if KIND == 2:
            rows = r_tile * from_start(gate, high, middle, low, i, GATE, True)
            dstate += mm(tl.trans(rows), dasked, DT, PRECISION)
        if not SUMMARY:
            of_dv = dv + t.to(tl.int64)[:, None] * (HV * V) + column[None, :]
            save(of_dv, dwritten, ok_t[:, None] & ok_v[None, :])
        elif KIND == 0:
            decayed = decayed * total

    if SUMMARY:
        if of_state > 0:
            if identity:
                of_p = transition + own * (K * K) + kk.to(tl.int64)[:, None] * K + column[None, :]
                tl.store(of_p, dstate, mask=ok_state)
            else:
                tl.store(dstart + own * (K * V) + state_at, dstate, mask=ok_state)
        else:
            tl.store(dstart + own * (K * V) + state_at, dstate, mask=ok_state)
            if block == 0:
                of_decays = transition + own * K + kk.to(tl.int64)
                tl.store(of_decays[:, None], decayed, mask=ok_k[:, None])
    elif part == 0:
        tl.store(dstart + (row * HV + head) * (K * V) + state_at, dstate, mask=ok_state)


@triton.jit(do_not_specialize=["tokens", "per_row", "scale"])
def gradients(
    q,
    k,
    v,
    a,
    b,
    beta,
    g,
    bonus,
    do,
    start,
    kept,
    kept_gradient,
    dq,
    dk,
    da,
    db,
    dbeta,
    dg,
    dbonus,
    bounds,
    base_of,
    row_of,
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
    do_b,
    do_t,
    do_h,
    tokens,
    per_row,
    scale,
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
    DT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """See the module. Grid: (chunks of all rows * HV,). dq, dk, da, db, dg are ``[B, T, HV, K]``, dbeta (and dg of heads) ``[B, T, HV]``,
    dbonus ``[chunks, HV, K]``: sums over what shares a key head, or over chunks, are left."""
    program = tl.program_id(0).to(tl.int64)
    head = program % HV
    chunk = program // HV
    if PACKED:
        row = tl.load(row_of + chunk).to(tl.int64)
        number = chunk - tl.load(base_of + row).to(tl.int64)
        first = tl.load(bounds + row).to(tl.int64)
        length = (tl.load(bounds + row + 1).to(tl.int64) - first).to(tl.int32)
        batch = tl.zeros_like(row)
    else:
        row = chunk // per_row
        number = chunk % per_row
        first = tl.zeros_like(row)
        length = tokens
        batch = row
    at = (number * C).to(tl.int32)
    i = tl.arange(0, C)
    t = at + i
    ok_t = t < length
    kk = tl.arange(0, BK)
    ok_k = kk < K

    q += batch * q_b + first * q_t + head // Q_GROUP * q_h
    k += batch * k_b + first * k_t + head // Q_GROUP * k_h
    v += batch * v_b + first * v_t + head * v_h
    do += batch * do_b + first * do_t + head * do_h
    q_tile = load_rows(q, t, q_t, kk, ok_t, ok_k)
    k_tile = load_rows(k, t, k_t, kk, ok_t, ok_k)
    r_tile = k_tile
    a_tile = k_tile
    if KIND == 2:
        a += batch * a_b + first * a_t + head // Q_GROUP * a_h
        b += batch * b_b + first * b_t + head // Q_GROUP * b_h
        a_tile = load_rows(a, t, a_t, kk, ok_t, ok_k)
        r_tile = load_rows(b, t, b_t, kk, ok_t, ok_k)
    gate = tl.zeros([C], tl.float32)
    if GATE > 0:
        g += batch * g_b + first * g_t + head // G_GROUP * g_h
        gate = load_gate(g, t, g_t, kk, ok_t, ok_k, GATE)
    high, middle, low = split(gate)

    of_q = from_start(gate, high, middle, low, i, GATE, BONUS)
    of_r = of_q
    if KIND == 2:
        of_r = from_start(gate, high, middle, low, i, GATE, True)
    ending = to_end(gate, high, middle, low, i, GATE)
    total = whole(gate, GATE)
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
    if BONUS:
        u = tl.load(bonus + head * K + kk, mask=ok_k, other=0.0).to(tl.float32)[None, :]
        qk += diagonal(q_tile * u, k_tile, i)
    else:
        qk += diagonal(q_tile, k_tile, i)
    if KIND == 1:
        beta += batch * beta_b + first * beta_t + head * beta_h
        rate = load_line(beta, t, beta_t, ok_t)[:, None]
        solve = unit_lower_inverse(rate * rk, i, LEVELS, DT, PRECISION)
        drate = tl.zeros([C], tl.float32)
    if KIND == 2:
        qa += diagonal(q_tile, a_tile, i)
        solve = unit_lower_inverse(-ra, i, LEVELS, DT, PRECISION)

    dqk = tl.zeros([C, C], tl.float32)
    drk = tl.zeros([C, C], tl.float32)
    dqa = tl.zeros([C, C], tl.float32)
    dra = tl.zeros([C, C], tl.float32)
    dq_tile = tl.zeros(
        [C, BK], tl.float32
    )  # as rows that read the state, and as columns that are written to it
    dr_tile = tl.zeros([C, BK], tl.float32)
    dk_tile = tl.zeros([C, BK], tl.float32)
    da_tile = tl.zeros([C, BK], tl.float32)
    dtotal = tl.zeros([BK], tl.float32)
    for at_v in range(0, V, BV):
        column = at_v + tl.arange(0, BV)
        ok_v = column < V
        ok_state = ok_k[:, None] & ok_v[None, :]
        state_at = kk.to(tl.int64)[:, None] * V + column[None, :]
        state = tl.zeros([BK, BV], tl.float32)
        if number > 0:
            of_chunk = kept + ((chunk - 1) * HV + head) * (K * V) + state_at
            state = tl.load(of_chunk, mask=ok_state, other=0.0).to(tl.float32)
        elif START:
            of_row = start + (row * HV + head) * (K * V) + state_at
            state = tl.load(of_row, mask=ok_state, other=0.0).to(tl.float32)
        of_gradient = kept_gradient + (chunk * HV + head) * (K * V) + state_at
        dstate = tl.load(of_gradient, mask=ok_state, other=0.0).to(tl.float32)
        v_tile = load_rows(v, t, v_t, column, ok_t, ok_v)
        do_tile = load_rows(do, t, do_t, column, ok_t, ok_v)
        dtotal += tl.sum(state * dstate, axis=1)
        dq_tile += mm(do_tile, tl.trans(state), DT, PRECISION)
        written = v_tile
        if KIND == 1:
            change = v_tile - mm_fine(r_tile * of_r, state, DT, PRECISION)
            written = mm_fine(solve, rate * change, DT, PRECISION)
            change -= mm_fine(rk, written, DT, PRECISION)  # u without its rate
            dwritten = mm(tl.trans(qk), do_tile, DT, PRECISION) * scale
            dwritten += mm(k_tile * ending, dstate, DT, PRECISION)
            dwritten = mm_fine(tl.trans(solve), dwritten, DT, PRECISION)
            drate += tl.sum(dwritten * change, axis=1)
            dwritten = -rate * dwritten
            dr_tile += mm(dwritten, tl.trans(state), DT, PRECISION)
            drk += mm(dwritten, tl.trans(written), DT, PRECISION)
        if KIND == 2:
            asked = mm(r_tile * of_r, state, DT, PRECISION) + mm(rk, v_tile, DT, PRECISION)
            found = mm_fine(solve, asked, DT, PRECISION)
            dfound = mm(tl.trans(qa), do_tile, DT, PRECISION) * scale
            dfound += mm(a_tile * ending, dstate, DT, PRECISION)
            dasked = mm_fine(tl.trans(solve), dfound, DT, PRECISION)
            dqa += mm(do_tile, tl.trans(found), DT, PRECISION)
            dra += mm(dasked, tl.trans(found), DT, PRECISION)
            drk += mm(dasked, tl.trans(v_tile), DT, PRECISION)
            dr_tile += mm(dasked, tl.trans(state), DT, PRECISION)
            da_tile += mm(found, tl.trans(dstate), DT, PRECISION)
        dqk += mm(do_tile, tl.trans(written), DT, PRECISION)
        dk_tile += mm(written, tl.trans(dstate), DT, PRECISION)

    dqk = dqk * scale
    dqa = dqa * scale
    dq_tile = dq_tile * of_q * scale
    dr_tile = dr_tile * of_r
    dk_tile = dk_tile * ending
    da_tile = da_tile * ending
    # A gate g_t is in every interval (j, i] with j < t <= i.
    up = i[None, :] >= i[:, None]
    strictly = i[None, :] > i[:, None]
    through = tl.sum(total * dtotal[:, None], axis=1)  # of what goes from the chunk's begin to its end
    if GATE == 2:
        to_columns = tl.sum(k_tile * dk_tile, axis=0)  # of what columns write to the chunk's end
        if KIND == 2:
            to_columns += tl.sum(a_tile * da_tile, axis=0)
    if GATE == 1:
        # Every interval is added to the gates in it and nothing is subtracted: a fixed gate's gradient is a sum over all tokens
        # that nearly cancels, and would show what a difference of sums loses.
        below = i[:, None] > i[None, :]
        of_pairs = tl.zeros([C, C], tl.float32)  # [i, j]
        of_rows = tl.zeros([C], tl.float32)
        of_columns = tl.sum(k_tile * dk_tile, axis=1)
        if not BONUS:
            of_pairs += tl.where(below, dqk * qk, 0.0)
            of_rows += tl.sum(q_tile * dq_tile, axis=1)
        if KIND == 1:
            of_pairs += tl.where(below, drk * rk, 0.0)
            of_rows += tl.sum(r_tile * dr_tile, axis=1)
        if KIND == 2:
            of_pairs += tl.where(below, dqa * qa, 0.0)
            of_columns += tl.sum(a_tile * da_tile, axis=1)
        ph, pm, pl = split(of_pairs)
        of_token = tl.sum(tl.where(below, sums(up, ph, pm, pl), 0.0), axis=1)
        of_token += tl.sum(tl.where(up, of_rows[None, :], 0.0), axis=1)
        if BONUS or KIND == 2:  # rows that stand before their own gate end at i - 1
            of_pairs = tl.zeros([C, C], tl.float32)
            of_rows = tl.zeros([C], tl.float32)
            if BONUS:
                of_pairs += tl.where(below, dqk * qk, 0.0)
                of_rows += tl.sum(q_tile * dq_tile, axis=1)
            if KIND == 2:
                of_pairs += tl.where(below, drk * rk + dra * ra, 0.0)
                of_rows += tl.sum(r_tile * dr_tile, axis=1)
            ph, pm, pl = split(of_pairs)
            of_token += tl.sum(tl.where(below, sums(strictly, ph, pm, pl), 0.0), axis=1)
            of_token += tl.sum(tl.where(strictly, of_rows[None, :], 0.0), axis=1)
        of_token += tl.sum(tl.where(below, of_columns[None, :], 0.0), axis=1) + tl.sum(through, axis=0)
        line = ((batch * tokens + first) * HV + head) + t.to(tl.int64) * HV
        save(dg + line, of_token, ok_t)
    dq_tile, dr_tile, dk_tile, da_tile = scores_gradient(
        q_tile,
        r_tile,
        k_tile,
        a_tile,
        gate,
        high,
        middle,
        low,
        i,
        dqk,
        drk,
        dqa,
        dra,
        dq_tile,
        dr_tile,
        dk_tile,
        da_tile,
        KIND,
        GATE,
        BONUS,
        LEVELS,
        DT,
        PRECISION,
    )

    base = ((batch * tokens + first) * HV + head) * K
    here = base + t.to(tl.int64)[:, None] * (HV * K) + kk[None, :]
    line = ((batch * tokens + first) * HV + head) + t.to(tl.int64) * HV
    ok_here = ok_t[:, None] & ok_k[None, :]
    if GATE == 2:
        # What ends at i >= t counts, what begins at j >= t counts against: the pairs themselves are nowhere, one for each channel.
        at_end = -(k_tile * dk_tile)
        behind = tl.zeros([C, BK], tl.float32)
        if BONUS:
            behind += q_tile * dq_tile
        else:
            at_end += q_tile * dq_tile
        if KIND == 1:
            at_end += r_tile * dr_tile
        if KIND == 2:
            behind += r_tile * dr_tile
            at_end -= a_tile * da_tile
        high, middle, low = split(at_end)
        of_token = sums(up, high, middle, low) + (through + to_columns)[None, :]
        if BONUS or KIND == 2:
            high, middle, low = split(behind)
            of_token += sums(strictly, high, middle, low)
        save(dg + here, of_token, ok_here)

    own = tl.sum(tl.where(i[:, None] == i[None, :], dqk, 0.0), axis=1)[:, None]
    if BONUS:
        dq_tile += own * u * k_tile
        dk_tile += own * u * q_tile
        save(dbonus + (chunk * HV + head) * K + kk, tl.sum(own * q_tile * k_tile, axis=0), ok_k)
    else:
        dq_tile += own * k_tile
        dk_tile += own * q_tile
    if KIND == 1:
        dk_tile += dr_tile
        save(dbeta + line, drate, ok_t)
    if KIND == 2:
        own = tl.sum(tl.where(i[:, None] == i[None, :], dqa, 0.0), axis=1)[:, None]
        dq_tile += own * a_tile
        da_tile += own * q_tile
        save(da + here, da_tile, ok_here)
        save(db + here, dr_tile, ok_here)
    save(dq + here, dq_tile, ok_here)
    save(dk + here, dk_tile, ok_here)
