"""All of a chunk that does not depend on the state before it, every chunk by itself: what the loop over chunks (``kernels/matrix.py``) then reads.

    P   [C, C]  decayed scores of q and k, the diagonal with them
    T   [C, C]  what the triangular system does to its right side: ``(I + diag(beta) A)^-1 diag(beta)``, or ``(I - A_ba)^-1``
    M, N        diagonal plus low rank: T A_bk, and decayed scores of q and a

and the decays between a chunk's borders and its tokens: a number for each token where a gate is one for the head (RQ, RR from the
border, EK to the border behind), or multiplied into q, r, k and a where it is one for each channel.

Columns of q and k are taken KB at a time, so that what a gate for each channel needs stays in registers.

A chunk is two halves of H tokens (or one): each as in ``chunk.py``, and the square below the diagonal between them by way of their
border, as is the inverse: ``[[X, 0], [L, Y]]^-1 = [[X', 0], [-Y' L X', Y']]``.

FUSED: q, k and v are a mixer's channels behind its convolution, beta and the gates before their activations (``kernels/gates.py``). Lengths
of q and k are among the numbers of a token then. Diagonal plus low rank is RWKV-7's (``kernels/rwkv.py``): a has the rates as projected,
k_k and k_a its weights, and v is mixed with the first layer's where there is one (STEPPED).
"""

import triton
import triton.language as tl

from linstate.ops.triton.kernels.chunk import (
    between,
    load_line,
    load_rows,
    log_from_start,
    log_to_end,
    mm,
    mm_fine,
    rounded,
    save,
    scores,
    unit_lower_inverse,
)
from linstate.ops.triton.kernels.gates import log_sigmoid, sigmoid, softplus
from linstate.ops.triton.kernels.rwkv import in_type_of, log_decay


@triton.jit
def inverse_lengths(
    q, k, k_k, t, q_t, k_t, ok_t, eps, K: tl.constexpr, BK: tl.constexpr, KIND: tl.constexpr
):
    """``[H]`` each: what rows of q and k are to be multiplied with to have length one; of RWKV-7 those of the removal key alone."""
    kk = tl.arange(0, BK)
    ok_k = kk < K
    k_tile = load_rows(k, t, k_t, kk, ok_t, ok_k).to(tl.float32)
    if KIND == 2:
        k_tile = k_tile * tl.load(k_k + kk, mask=ok_k, other=0.0).to(tl.float32)[None, :]
        q_tile = k_tile
    else:
        q_tile = load_rows(q, t, q_t, kk, ok_t, ok_k).to(tl.float32)
    of_q = 1.0 / tl.sqrt(tl.sum(q_tile * q_tile, axis=1) + eps)
    return of_q, 1.0 / tl.sqrt(tl.sum(k_tile * k_tile, axis=1) + eps)


@triton.jit
def head_gate(
    g,
    t,
    g_t,
    ok_t,
    offset,
    speed,
    least,
    most,
    FUSED: tl.constexpr,
    STEPPED: tl.constexpr,
):
    """``[H]`` each: the log gates of a head, and the steps that its values are multiplied with."""
    taken = tl.where(ok_t, 1.0, 1.0)
    if FUSED:
        step = softplus(load_line(g, t, g_t, ok_t) + offset)
        step = tl.where(ok_t, tl.minimum(tl.maximum(step, least), most), 0.0)
        gate = tl.maximum(speed * step, -1e5)
        if STEPPED:
            taken = step
    else:
        gate = tl.maximum(load_line(g, t, g_t, ok_t), -1e5)
    return gate, taken


@triton.jit
def tiles(
    q,
    k,
    a,
    b,
    g,
    k_k,
    k_a,
    step_bias,
    speed,
    t,
    ok_t,
    kk,
    ok_k,
    q_t,
    k_t,
    a_t,
    b_t,
    g_t,
    line,
    of_q,
    of_k,
    divisor,
    KIND: tl.constexpr,
    GATE: tl.constexpr,
    FUSED: tl.constexpr,
    DECAY: tl.constexpr,
    OFFSET: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Rows of H tokens, some of their columns, as the recurrence has them, and the gates of these (``line``, where there is one for the head)."""
    q_tile = load_rows(q, t, q_t, kk, ok_t, ok_k)
    k_tile = load_rows(k, t, k_t, kk, ok_t, ok_k)
    if UNIT and GATE == 2:
        q_tile = in_type_of(q_tile.to(tl.float32) * of_q[:, None], q_tile)
        k_tile = in_type_of(k_tile.to(tl.float32) * of_k[:, None], k_tile)
    r_tile = k_tile
    a_tile = k_tile
    if KIND == 2:
        a_tile = load_rows(a, t, a_t, kk, ok_t, ok_k)
        if FUSED:
            wide = k_tile.to(tl.float32)
            rate = sigmoid(a_tile.to(tl.float32))
            kappa = wide * tl.load(k_k + kk, mask=ok_k, other=0.0).to(tl.float32)[None, :] * of_k[:, None]
            share = tl.load(k_a + kk, mask=ok_k, other=0.0).to(tl.float32)[None, :]
            r_tile = in_type_of(kappa, k_tile)
            a_tile = in_type_of(-rate * kappa, k_tile)
            k_tile = in_type_of(wide * (1.0 + (rate - 1.0) * share), k_tile)
        else:
            r_tile = load_rows(b, t, b_t, kk, ok_t, ok_k)
    gate = line
    if GATE == 2:
        gate = load_rows(g, t, g_t, kk, ok_t, ok_k).to(tl.float32)
        if FUSED:
            offset = tl.zeros_like(gate)
            if OFFSET:
                offset += tl.load(step_bias + kk, mask=ok_k, other=0.0).to(tl.float32)[None, :]
            if KIND == 2:
                gate = log_decay(gate)
            if DECAY == 2:
                gate = speed * softplus(gate + offset)
            if DECAY == 3:
                gate = log_sigmoid(gate + offset) / divisor
            if DECAY == 4:
                gate = -tl.exp(gate + offset)
            gate = tl.where(ok_t[:, None] & ok_k[None, :], gate, 0.0)
        gate = tl.maximum(gate, -1e5)
    return q_tile, r_tile, k_tile, a_tile, gate


@triton.jit
def reads(upto, before, KIND: tl.constexpr, BONUS: tl.constexpr):
    """Of the decays up to a token, with its own and without, those behind which q and r read."""
    of_q = upto
    of_r = upto
    if BONUS:
        of_q = before
    if KIND == 2:
        of_r = before
    return of_q, of_r


@triton.jit
def put(base, i, j, x, ok, C: tl.constexpr):
    """A block of a square ``[C, C]`` whose rows lie one behind the other."""
    save(base + i.to(tl.int64)[:, None] * C + j[None, :], x, ok[:, None])


@triton.jit
def put_system(base, low, i, j, x, ok, C: tl.constexpr, DT: tl.constexpr):
    """The same for T: in bfloat16 as two whose sum it is, 2^-17 off, as what it is multiplied with may cancel."""
    put(base, i, j, x, ok, C)
    if tl.bfloat16 == DT:
        put(low, i, j, x - rounded(x, tl.bfloat16).to(tl.float32), ok, C)


@triton.jit
def put_rows(
    q_rows,
    r_rows,
    k_rows,
    a_rows,
    t,
    ok_t,
    kk,
    ok_k,
    q_tile,
    r_tile,
    k_tile,
    a_tile,
    of_q,
    of_r,
    of_end,
    HV: tl.constexpr,
    K: tl.constexpr,
    KIND: tl.constexpr,
):
    """Rows behind their decays, for a gate for each channel."""
    at = t.to(tl.int64)[:, None] * (HV * K) + kk[None, :]
    ok = ok_t[:, None] & ok_k[None, :]
    ending = tl.exp(of_end)
    save(q_rows + at, q_tile * tl.exp(of_q), ok)
    save(k_rows + at, k_tile * ending, ok)
    if KIND > 0:
        save(r_rows + at, r_tile * tl.exp(of_r), ok)
    if KIND == 2:
        save(a_rows + at, a_tile * ending, ok)


@triton.jit
def put_lines(
    q_line, r_line, k_line, t, ok_t, taken, of_q, of_k, log_q, log_r, of_end, GATE: tl.constexpr, KIND: tl.constexpr
):
    """What rows are multiplied with, for other gates."""
    at = t.to(tl.int64)
    if GATE == 1:
        of_q *= tl.exp(tl.sum(log_q, axis=1))
        taken *= tl.exp(tl.sum(of_end, axis=1))
    tl.store(q_line + at, of_q, mask=ok_t)
    tl.store(k_line + at, taken * of_k, mask=ok_t)
    if KIND > 0:
        if GATE == 1:
            of_k *= tl.exp(tl.sum(log_r, axis=1))
        tl.store(r_line + at, of_k, mask=ok_t)


@triton.jit(
    do_not_specialize=["tokens", "chunks", "unit_eps", "beta_scale", "divisor", "least", "most"],
)
def prepare(
    q,
    k,
    v,
    a,
    b,
    beta,
    g,
    bonus,
    qk_out,
    solve_out,
    low_out,
    rk_out,
    qa_out,
    q_line,
    r_line,
    k_line,
    totals,
    q_rows,
    r_rows,
    k_rows,
    a_rows,
    v_rows,
    bounds,
    k_k,
    k_a,
    log_rate,
    step_bias,
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
    chunks,
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
    KB: tl.constexpr,
    BV: tl.constexpr,
    H: tl.constexpr,
    HALVES: tl.constexpr,
    LEVELS: tl.constexpr,
    KIND: tl.constexpr,
    GATE: tl.constexpr,
    LINES: tl.constexpr,
    BONUS: tl.constexpr,
    PACKED: tl.constexpr,
    FUSED: tl.constexpr,
    DECAY: tl.constexpr,
    OFFSET: tl.constexpr,
    UNIT: tl.constexpr,
    STEPPED: tl.constexpr,
    DT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """See the module. Grid: (rows * HV * chunks,).

    Squares are ``[B, HV, T, C]``, lines ``[B, HV, T]``, rows ``[B, T, HV, K]``, and the decays of whole chunks ``[places, HV, K or 1]``, a chunk's place
    being (tokens before its sequence) / C + sequences before it + its number, which is nobody else's.
    """
    C: tl.constexpr = H * HALVES
    BY_CHANNEL: tl.constexpr = GATE if GATE == 2 else 0  # other gates are multiplied in behind the loop
    program = tl.program_id(0).to(tl.int64)
    chunk = program % chunks
    head = program // chunks % HV
    row = program // chunks // HV
    if PACKED:
        first = tl.load(bounds + row).to(tl.int64)
        length = (tl.load(bounds + row + 1).to(tl.int64) - first).to(tl.int32)
        batch = tl.zeros_like(row)
    else:
        first = tl.zeros_like(row)
        length = tokens
        batch = row
    begin = (chunk * C).to(tl.int32)
    if begin >= length:
        return
    i = tl.arange(0, H)
    of_head = head // Q_GROUP
    q += batch * q_b + first * q_t + of_head * q_h
    k += batch * k_b + first * k_t + of_head * k_h
    if KIND == 2:
        a += batch * a_b + first * a_t + of_head * a_h
        b += batch * b_b + first * b_t + of_head * b_h
        if FUSED:
            k_k += of_head * K
            k_a += of_head * K
    if KIND == 1:
        beta += batch * beta_b + first * beta_t + head * beta_h
    if GATE > 0:
        g += batch * g_b + first * g_t + head // G_GROUP * g_h
    speed = 0.0
    offset = 0.0
    if DECAY == 1 or DECAY == 2:
        speed = -tl.exp(tl.load(log_rate + head).to(tl.float32))
    if DECAY == 1:
        offset = tl.load(step_bias + head).to(tl.float32)
    of_channels = step_bias
    if OFFSET and GATE == 2:
        of_channels += of_head * K
    if BONUS:
        bonus += head * K

    line = (batch * HV + head) * tokens + first
    square = line + begin
    qk_out += square * C
    if KIND > 0:
        solve_out += square * C
        if tl.bfloat16 == DT:
            low_out += square * C
    if KIND == 2:
        rk_out += square * C
        qa_out += square * C
    if LINES:
        q_line += line
        k_line += line
        if KIND > 0:
            r_line += line
    token = (batch * tokens + first) * HV + head
    if GATE == 2:
        q_rows += token * K
        k_rows += token * K
        if KIND > 0:
            r_rows += token * K
        if KIND == 2:
            a_rows += token * K
    place = ((batch * tokens + first) // C + row + chunk) * HV + head

    t = begin + i
    s = t + H
    ok_t = t < length
    ok_s = s < length
    ones = tl.full([H], 1.0, tl.float32)
    of_q0, of_k0, of_q1, of_k1, taken0, taken1 = ones, ones, ones, ones, ones, ones
    gate0, gate1 = tl.zeros([H], tl.float32), tl.zeros([H], tl.float32)
    if UNIT or (FUSED and KIND == 2):
        of_q0, of_k0 = inverse_lengths(q, k, k_k, t, q_t, k_t, ok_t, unit_eps, K, BK, KIND)
        if HALVES == 2:
            of_q1, of_k1 = inverse_lengths(q, k, k_k, s, q_t, k_t, ok_s, unit_eps, K, BK, KIND)
    if GATE == 1:
        gate0, taken0 = head_gate(g, t, g_t, ok_t, offset, speed, least, most, FUSED, STEPPED)
        if HALVES == 2:
            gate1, taken1 = head_gate(g, s, g_t, ok_s, offset, speed, least, most, FUSED, STEPPED)

    none = tl.zeros([H, H], tl.float32)
    qk0, rk0, qa0, ra0 = none, none, none, none  # the first half
    qk1, rk1, qa1, ra1 = none, none, none, none  # the second
    qk2, rk2, qa2, ra2 = none, none, none, none  # the second's rows, the first's columns, by way of the border between them
    own0, own1 = tl.zeros([H], tl.float32), tl.zeros([H], tl.float32)  # of a token with itself
    own_a0, own_a1 = tl.zeros([H], tl.float32), tl.zeros([H], tl.float32)
    for column in tl.range(0, BK, KB):
        kk = column + tl.arange(0, KB)
        ok_k = kk < K
        q0, r0, k0, a0, g0 = tiles(
            q, k, a, b, g, k_k, k_a, of_channels, speed, t, ok_t, kk, ok_k, q_t, k_t, a_t, b_t, g_t,
            gate0, of_q0, of_k0, divisor, KIND, GATE, FUSED, DECAY, OFFSET, UNIT,
        )
        of_qk, of_rk, of_qa, of_ra, start0, before0, end0 = scores(
            q0, r0, k0, a0, g0, i, KIND, BY_CHANNEL, BONUS, H, LEVELS, DT, PRECISION,
        )
        start0, before0 = reads(start0, before0, KIND, BONUS)
        total = tl.sum(g0, axis=0)
        qk0 += of_qk
        rk0 += of_rk
        qa0 += of_qa
        ra0 += of_ra
        seen = q0.to(tl.float32)
        if KIND == 2:
            own_a0 += tl.sum(seen * a0.to(tl.float32), axis=1)
        if BONUS:
            seen = seen * tl.load(bonus + kk, mask=ok_k, other=0.0).to(tl.float32)[None, :]
        own0 += tl.sum(seen * k0.to(tl.float32), axis=1)
        if HALVES == 2:
            q1, r1, k1, a1, g1 = tiles(
                q, k, a, b, g, k_k, k_a, of_channels, speed, s, ok_s, kk, ok_k, q_t, k_t, a_t, b_t, g_t,
                gate1, of_q1, of_k1, divisor, KIND, GATE, FUSED, DECAY, OFFSET, UNIT,
            )
            of_qk, of_rk, of_qa, of_ra, start1, before1, end1 = scores(
                q1, r1, k1, a1, g1, i, KIND, BY_CHANNEL, BONUS, H, LEVELS, DT, PRECISION,
            )
            start1, before1 = reads(start1, before1, KIND, BONUS)
            qk1 += of_qk
            rk1 += of_rk
            qa1 += of_qa
            ra1 += of_ra
            seen = q1.to(tl.float32)
            if KIND == 2:
                own_a1 += tl.sum(seen * a1.to(tl.float32), axis=1)
            if BONUS:
                seen = seen * tl.load(bonus + kk, mask=ok_k, other=0.0).to(tl.float32)[None, :]
            own1 += tl.sum(seen * k1.to(tl.float32), axis=1)
            if GATE == 2:
                near = tl.exp(end0)
                k_column = tl.trans(k0 * near)
                q_row = q1 * tl.exp(start1)
                qk2 += mm(q_row, k_column, DT, PRECISION)
                if KIND > 0:
                    r_row = r1 * tl.exp(before1)
                    rk2 += mm(r_row, k_column, DT, PRECISION)
                    if KIND == 2:
                        a_column = tl.trans(a0 * near)
                        qa2 += mm(q_row, a_column, DT, PRECISION)
                        ra2 += mm(r_row, a_column, DT, PRECISION)
                # seen from the chunk's borders, the first half is followed by the second
                of_second = tl.sum(g1, axis=0)
                put_rows(
                    q_rows,
                    r_rows,
                    k_rows,
                    a_rows,
                    s,
                    ok_s,
                    kk,
                    ok_k,
                    q1,
                    r1,
                    k1,
                    a1,
                    start1 + total[None, :],
                    before1 + total[None, :],
                    end1,
                    HV,
                    K,
                    KIND,
                )
                end0 += of_second[None, :]
                total += of_second
            else:
                qk2 += mm(q1, tl.trans(k0), DT, PRECISION)
                if KIND > 0:
                    rk2 += mm(r1, tl.trans(k0), DT, PRECISION)
                    if KIND == 2:
                        qa2 += mm(q1, tl.trans(a0), DT, PRECISION)
                        ra2 += mm(r1, tl.trans(a0), DT, PRECISION)
        if GATE == 2:
            put_rows(
                q_rows,
                r_rows,
                k_rows,
                a_rows,
                t,
                ok_t,
                kk,
                ok_k,
                q0,
                r0,
                k0,
                a0,
                start0,
                before0,
                end0,
                HV,
                K,
                KIND,
            )
            tl.store(totals + place * K + kk, tl.exp(total), mask=ok_k)

    if GATE < 2 and LINES:
        start0 = log_from_start(gate0, gate0, gate0, gate0, i, GATE, BONUS)
        before0 = log_from_start(gate0, gate0, gate0, gate0, i, GATE, KIND == 2)
        end0 = log_to_end(gate0, gate0, gate0, gate0, i, GATE)
        total = tl.sum(gate0, axis=0)
        if GATE == 1:
            qk0 *= between(gate0, i, BONUS)
            if KIND > 0:
                of_r = between(gate0, i, KIND == 2)
                rk0 *= of_r
                qa0 *= between(gate0, i, BONUS)
                ra0 *= of_r
        if HALVES == 2:
            start1 = log_from_start(gate1, gate1, gate1, gate1, i, GATE, BONUS)
            before1 = log_from_start(gate1, gate1, gate1, gate1, i, GATE, KIND == 2)
            end1 = log_to_end(gate1, gate1, gate1, gate1, i, GATE)
            if GATE == 1:
                of_q = between(gate1, i, BONUS)
                qk1 *= of_q
                qk2 *= tl.exp(start1 + tl.trans(end0))
                if KIND > 0:
                    of_r = between(gate1, i, KIND == 2)
                    rk1 *= of_r
                    qa1 *= of_q
                    ra1 *= of_r
                    of_r = tl.exp(before1 + tl.trans(end0))
                    rk2 *= of_r
                    qa2 *= tl.exp(start1 + tl.trans(end0))
                    ra2 *= of_r
            of_second = tl.sum(gate1, axis=0)
            put_lines(
                q_line,
                r_line,
                k_line,
                s,
                ok_s,
                taken1,
                of_q1,
                of_k1,
                start1 + total,
                before1 + total,
                end1,
                GATE,
                KIND,
            )
            end0 += of_second
            total += of_second
        put_lines(
            q_line, r_line, k_line, t, ok_t, taken0, of_q0, of_k0, start0, before0, end0, GATE, KIND
        )
        if GATE == 1:
            tl.store(totals + place, tl.exp(total))

    same = i[:, None] == i[None, :]
    qk0 += tl.where(same, own0[:, None], 0.0)
    qk1 += tl.where(same, own1[:, None], 0.0)
    if UNIT and GATE < 2:
        qk0 *= of_q0[:, None] * of_k0[None, :]
        qk1 *= of_q1[:, None] * of_k1[None, :]
        qk2 *= of_q1[:, None] * of_k0[None, :]
        rk0 *= of_k0[:, None] * of_k0[None, :]
        rk1 *= of_k1[:, None] * of_k1[None, :]
        rk2 *= of_k1[:, None] * of_k0[None, :]
    if STEPPED and KIND == 0:  # values by their steps, in what they meet
        qk0 *= taken0[None, :]
        qk1 *= taken1[None, :]
        qk2 *= taken0[None, :]
    put(qk_out, i, i, qk0, ok_t, C)
    if HALVES == 2:
        put(qk_out, i + H, i + H, qk1, ok_s, C)
        put(qk_out, i + H, i, qk2, ok_s, C)
        put(qk_out, i, i + H, none, ok_t, C)
    if KIND == 2:
        put(qa_out, i, i, qa0 + tl.where(same, own_a0[:, None], 0.0), ok_t, C)
        if HALVES == 2:
            put(qa_out, i + H, i + H, qa1 + tl.where(same, own_a1[:, None], 0.0), ok_s, C)
            put(qa_out, i + H, i, qa2, ok_s, C)
            put(qa_out, i, i + H, none, ok_t, C)
    if KIND == 1:
        rate0 = load_line(beta, t, beta_t, ok_t)
        rate1 = load_line(beta, s, beta_t, ok_s)
        if FUSED:
            rate0 = tl.where(ok_t, sigmoid(rate0) * beta_scale, 0.0)
            rate1 = tl.where(ok_s, sigmoid(rate1) * beta_scale, 0.0)
        x0 = unit_lower_inverse(rate0[:, None] * rk0, i, LEVELS, DT, PRECISION)
        put_system(solve_out, low_out, i, i, x0 * rate0[None, :], ok_t, C, DT)
        if HALVES == 2:
            x1 = unit_lower_inverse(rate1[:, None] * rk1, i, LEVELS, DT, PRECISION)
            put_system(solve_out, low_out, i + H, i + H, x1 * rate1[None, :], ok_s, C, DT)
            below = mm_fine(x1, mm_fine(rate1[:, None] * rk2, x0, DT, PRECISION), DT, PRECISION)
            put_system(solve_out, low_out, i + H, i, -below * rate0[None, :], ok_s, C, DT)
            put_system(solve_out, low_out, i, i + H, none, ok_t, C, DT)
    if KIND == 2:
        x0 = unit_lower_inverse(-ra0, i, LEVELS, DT, PRECISION)
        put_system(solve_out, low_out, i, i, x0, ok_t, C, DT)
        put(rk_out, i, i, mm_fine(x0, rk0, DT, PRECISION), ok_t, C)
        if HALVES == 2:
            x1 = unit_lower_inverse(-ra1, i, LEVELS, DT, PRECISION)
            put_system(solve_out, low_out, i + H, i + H, x1, ok_s, C, DT)
            put(rk_out, i + H, i + H, mm_fine(x1, rk1, DT, PRECISION), ok_s, C)
            below = mm_fine(x1, mm_fine(ra2, x0, DT, PRECISION), DT, PRECISION)
            put_system(solve_out, low_out, i + H, i, below, ok_s, C, DT)
            of_rows = mm_fine(x1, rk2, DT, PRECISION) + mm_fine(below, rk0, DT, PRECISION)
            put(rk_out, i + H, i, of_rows, ok_s, C)
            put_system(solve_out, low_out, i, i + H, none, ok_t, C, DT)
            put(rk_out, i, i + H, none, ok_t, C)
    if FUSED and KIND == 2 and STEPPED:
        at_v = batch * v_b + first * v_t + head * v_h
        for number in range(0, HALVES * ((V + BV - 1) // BV)):
            w = begin + number % HALVES * H + i
            column = number // HALVES * BV + tl.arange(0, BV)
            ok_w, ok_v = w < length, column < V
            found = load_rows(v + at_v, w, v_t, column, ok_w, ok_v).to(tl.float32)
            share = sigmoid(load_rows(log_rate + at_v, w, v_t, column, ok_w, ok_v).to(tl.float32))
            other = load_rows(step_bias + at_v, w, v_t, column, ok_w, ok_v).to(tl.float32)
            where = v_rows + token * V + w.to(tl.int64)[:, None] * (HV * V) + column[None, :]
            save(where, found + (other - found) * share, ok_w[:, None] & ok_v[None, :])
