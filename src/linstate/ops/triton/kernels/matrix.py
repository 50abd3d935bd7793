"""Forward of the recurrences on a matrix state: the loop over the chunks of a head in one launch, the state in registers.

What of a chunk does not depend on the state was made before, for all chunks at once (``kernels/prepare.py``). A program has one sequence (or one
segment of it), one head and BV value columns, and is left with a few matmuls: what the state answers, what the triangular system makes of it, the
output, and the state. The states between chunks are never in memory, unless they are asked for (KEEP).

SUMMARY: no o; instead what the segment does to a state, ``S -> P S + H``: H from an empty state, and, in programs of their
own, P from the identity with nothing written. In linear attention P is a vector of K decays.
"""

import triton
import triton.language as tl

from linstate.ops.triton.kernels.chunk import load_line, load_rows, mm, mm_fine, save


@triton.jit
def load_square(base, t, i, ok_t, C: tl.constexpr):
    """Rows t of squares ``[C, C]``, as they are stored."""
    return tl.load(base + t.to(tl.int64)[:, None] * C + i[None, :], mask=ok_t[:, None], other=0.0)


@triton.jit(
    do_not_specialize=["tokens", "segment", "segments", "parts", "every", "keep_rows", "scale"],
)
def forward(
    q,
    r,
    k,
    v,
    a,
    qk,
    solve,
    solve_low,
    rk,
    qa,
    q_line,
    r_line,
    k_line,
    totals,
    skip,
    o,
    start,
    after,
    kept,
    transition,
    bounds,
    kept_base,
    q_b,
    q_t,
    q_h,
    r_b,
    r_t,
    r_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    a_b,
    a_t,
    a_h,
    tokens,
    segment,
    segments,
    parts,
    every,
    keep_rows,
    scale,
    HV: tl.constexpr,
    Q_GROUP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    KIND: tl.constexpr,
    GATE: tl.constexpr,
    LINES: tl.constexpr,
    START: tl.constexpr,
    PACKED: tl.constexpr,
    KEEP: tl.constexpr,
    SUMMARY: tl.constexpr,
    SKIP: tl.constexpr,
    DT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """See the module. Grid: (rows * HV * parts * blocks of columns,), of a sequence's ``segments`` the first ``parts``; strides of batch, time
    and head in elements. r: the rows that read in the triangular system, which are k itself in the delta rule where nothing is multiplied into them."""
    blocks: tl.constexpr = (V + BV - 1) // BV
    of_state: tl.constexpr = (K + BV - 1) // BV if SUMMARY and KIND > 0 else 0
    own_rows: tl.constexpr = KIND == 2 or GATE == 2
    program = tl.program_id(0).to(tl.int64)
    block = program % (blocks + of_state)
    program = program // (blocks + of_state)
    part = program % parts
    program = program // parts
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

    k += batch * k_b + first * k_t + head // Q_GROUP * k_h
    v += batch * v_b + first * v_t + head * v_h
    line = (batch * HV + head) * tokens + first
    if KIND > 0:
        solve += line * C
        if tl.bfloat16 == DT:
            solve_low += line * C
        if own_rows:
            r += batch * r_b + first * r_t + head // Q_GROUP * r_h
    if KIND == 2:
        a += batch * a_b + first * a_t + head // Q_GROUP * a_h
        rk += line * C
    if not SUMMARY:
        q += batch * q_b + first * q_t + head // Q_GROUP * q_h
        o += ((batch * tokens + first) * HV + head) * V
        qk += line * C
        if KIND == 2:
            qa += line * C
    if LINES:
        k_line += line
        if KIND > 0:
            r_line += line
        if not SUMMARY:
            q_line += line
    if GATE == 1:
        totals += ((batch * tokens + first) // C + row) * HV + head
    if GATE == 2:
        totals += (((batch * tokens + first) // C + row) * HV + head) * K + kk

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

    for at in range(begin, end, C):
        t = at + i
        ok_t = t < end
        k_tile = load_rows(k, t, k_t, kk, ok_t, ok_k)
        v_tile = load_rows(v, t, v_t, column, ok_t, writes)
        if KIND > 0:
            r_tile = k_tile
            if own_rows:
                r_tile = load_rows(r, t, r_t, kk, ok_t, ok_k)
            asked = mm(r_tile, state, DT, PRECISION)
            if LINES:
                asked *= load_line(r_line, t, 1, ok_t)[:, None]
            if KIND == 1:
                asked = v_tile.to(tl.float32) - asked
            found = mm(load_square(solve, t, i, ok_t, C), asked, DT, PRECISION)
            if tl.bfloat16 == DT:
                found += mm(load_square(solve_low, t, i, ok_t, C), asked, DT, PRECISION)
        written = v_tile  # what k writes
        if KIND == 1:
            written = found
        if KIND == 2:  # what a writes
            found += mm(load_square(rk, t, i, ok_t, C), v_tile, DT, PRECISION)

        if not SUMMARY:
            q_tile = load_rows(q, t, q_t, kk, ok_t, ok_k)
            seen = mm(q_tile, state, DT, PRECISION)
            if LINES:
                seen *= load_line(q_line, t, 1, ok_t)[:, None]
            seen += mm(load_square(qk, t, i, ok_t, C), written, DT, PRECISION)
            if KIND == 2:
                seen += mm(load_square(qa, t, i, ok_t, C), found, DT, PRECISION)
            seen = seen * scale
            if SKIP:
                seen += tl.load(skip + head).to(tl.float32) * v_tile.to(tl.float32)
            place = o + t.to(tl.int64)[:, None] * (HV * V) + column[None, :]
            save(place, seen, ok_t[:, None] & ok_v[None, :])

        if LINES:
            ending = load_line(k_line, t, 1, ok_t)[:, None]
            written = written.to(tl.float32) * ending
        if GATE == 1:
            total = tl.load(totals + (row * 0 + at) // C * HV)
            state = state * total
        if GATE == 2:
            total = tl.load(totals + (row * 0 + at) // C * (HV * K), mask=ok_k, other=0.0)[:, None]
            state = state * total
        state += mm(tl.trans(k_tile), written, DT, PRECISION)
        if KIND == 2:
            if LINES:
                found = found * ending
            state += mm(tl.trans(load_rows(a, t, a_t, kk, ok_t, ok_k)), found, DT, PRECISION)
        if SUMMARY and KIND == 0 and GATE > 0:
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
    DT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The state before every segment, from their summaries; BACKWARD: from the last to the first. Grid: (rows * HV * blocks,).

    TRANSITION: P is 0 a factor for each entry of the state, 1 for each k, 2 a matrix.

    P of K = 256 would not fit on chip: then PART is less than BK, and S is read back from where it was just stored, so many rows at a time.
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
        if number < count - 1:  # what the last one does is for the programs that read it
            increment = tl.load(increments + own * (K * V) + state_at, mask=ok_state, other=0.0)
            if TRANSITION == 2 and PART == BK:
                left = tl.load(
                    transition + own * (K * K) + kk.to(tl.int64)[:, None] * K + kk[None, :],
                    mask=ok_k[:, None] & ok_k[None, :],
                    other=0.0,
                )
                state = increment + mm_fine(left, state, DT, PRECISION)
            elif TRANSITION == 2:
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
                    increment += mm_fine(left, right, DT, PRECISION)
                state = increment
            elif TRANSITION == 1:
                decayed = tl.load(transition + own * K + kk.to(tl.int64), mask=ok_k, other=0.0)
                state = decayed[:, None] * state + increment
            else:
                decayed = tl.load(transition + own * (K * V) + state_at, mask=ok_state, other=0.0)
                state = decayed * state + increment
