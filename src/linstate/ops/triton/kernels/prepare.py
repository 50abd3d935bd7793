"""All of a chunk that does not depend on the state before it, every chunk by itself: what the loop over chunks (``kernels/matrix.py``) then reads.

    qk_out     [C, C]  decayed scores of q and k, the diagonal with them
    solve_out  [C, C]  what the triangular system does to its right side, T: ``(I + diag(beta) A)^-1 diag(beta)``, or ``(I - A_ba)^-1``
    rk_out, qa_out     diagonal plus low rank: T A_bk, and decayed scores of q and a

and the decays between a chunk's borders and its tokens: a number for each token where a gate is one for the head (q_line and r_line from the
border, k_line to the border behind), or multiplied into q, r, k and a where it is one for each channel (q_rows and so on).

Columns of q and k are taken KB at a time, so that what a gate for each channel needs stays in registers.

A chunk is two halves of H tokens (or one): each as in ``chunk.py``, and the square below the diagonal between them by way of their
border, as is the inverse: ``[[X, 0], [L, Y]]^-1 = [[X', 0], [-Y' L X', Y']]``.

FUSED: q, k and v are a mixer's channels behind its convolution, beta and the gates before their activations (``kernels/gates.py``). Lengths
of q and k are among the numbers of a token then. Diagonal plus low rank is RWKV-7's (``kernels/rwkv.py``): a has the rates as projected,
k_k and k_a its weights, and v is mixed with the first layer's where there is one (STEPPED).
"""

import triton
import triton.language as tl

from linstate.ops.triton.kernels.chunk import between, exp, mm_fine, unit_lower_inverse
from linstate.ops.triton.kernels.halves import (
    decayed,
    put_borders,
    put_values,
    rates,
    scores_below,
    scores_of_half,
)
from linstate.ops.triton.kernels.tiles import head_gate, inverse_lengths, put, put_system


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
    EXACT: tl.constexpr = tl.bfloat16 != DT
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
    same = i[:, None] == i[None, :]
    # Inverses of the halves. Not handed on as ``x0, x1 = x1, x``: Triton (3.6 to 3.9) compiles x0 as what it was before the loop
    x0, x1 = none, none
    rk0 = none
    for number in tl.range(0, HALVES):  # the halves by themselves
        second = number == 1
        place_of = i + number * H
        w = begin + place_of
        ok = w < length
        of_q = tl.where(second, of_q1, of_q0)
        of_k = tl.where(second, of_k1, of_k0)
        gate = tl.where(second, gate1, gate0)
        qk, rk, qa, ra, own, own_a = scores_of_half(
            q,
            k,
            a,
            b,
            g,
            k_k,
            k_a,
            of_channels,
            q_t,
            k_t,
            a_t,
            b_t,
            g_t,
            bonus,
            speed,
            divisor,
            gate,
            of_q,
            of_k,
            w,
            ok,
            i,
            K,
            BK,
            KB,
            H,
            LEVELS,
            KIND,
            GATE,
            BONUS,
            FUSED,
            DECAY,
            OFFSET,
            UNIT,
            DT,
            PRECISION,
        )
        if GATE == 1:
            decay = between(gate, i, BONUS)
            strict = decay
            if KIND == 2:
                strict = between(gate, i, True)
            qk, rk, qa, ra = decayed(qk, rk, qa, ra, decay, strict, KIND)
        qk += tl.where(same, own[:, None], 0.0)
        if UNIT and GATE < 2:
            qk *= of_q[:, None] * of_k[None, :]
            rk *= of_k[:, None] * of_k[None, :]
        if STEPPED and KIND == 0:  # values by their steps, in what they meet
            qk *= tl.where(second, taken1, taken0)[None, :]
        put(qk_out, place_of, place_of, qk, ok, C)
        if KIND == 1:
            rate = rates(beta, w, beta_t, ok, beta_scale, FUSED)
            x = unit_lower_inverse(rate[:, None] * rk, i, LEVELS, DT, PRECISION)
            put_system(solve_out, low_out, place_of, place_of, x * rate[None, :], ok, C, DT)
            x0, x1 = tl.where(second, x0, x), x
        if KIND == 2:
            x = unit_lower_inverse(-ra, i, LEVELS, DT, PRECISION)
            put_system(solve_out, low_out, place_of, place_of, x, ok, C, DT)
            put(rk_out, place_of, place_of, mm_fine(x, rk, DT, PRECISION), ok, C)
            put(qa_out, place_of, place_of, qa + tl.where(same, own_a[:, None], 0.0), ok, C)
            x0, x1 = tl.where(second, x0, x), x
            rk0 = tl.where(second, rk0, rk)

    start1, before1, end0 = 0.0, 0.0, 0.0
    if GATE < 2 and LINES:
        start1, before1, end0, total = put_borders(
            q_line,
            r_line,
            k_line,
            (t, ok_t, taken0, of_q0, of_k0, gate0),
            (s, ok_s, taken1, of_q1, of_k1, gate1),
            i,
            GATE,
            KIND,
            BONUS,
            HALVES,
        )
        if GATE == 1:
            tl.store(totals + place, exp(total))
    of_totals = totals
    if GATE == 2:
        of_totals += place * K
    if HALVES == 2 or GATE == 2:
        qk, rk, qa, ra = scores_below(
            q,
            k,
            a,
            b,
            g,
            k_k,
            k_a,
            of_channels,
            q_t,
            k_t,
            a_t,
            b_t,
            g_t,
            q_rows,
            r_rows,
            k_rows,
            a_rows,
            of_totals,
            speed,
            divisor,
            (t, ok_t, gate0, of_q0, of_k0),
            (s, ok_s, gate1, of_q1, of_k1),
            i,
            HV,
            K,
            BK,
            KB,
            H,
            HALVES,
            KIND,
            GATE,
            BONUS,
            FUSED,
            DECAY,
            OFFSET,
            UNIT,
            DT,
            PRECISION,
            EXACT,
        )
        if HALVES == 2:
            if GATE == 1:
                decay = exp(start1 + tl.trans(end0))
                strict = decay
                if KIND == 2:
                    strict = exp(before1 + tl.trans(end0))
                qk, rk, qa, ra = decayed(qk, rk, qa, ra, decay, strict, KIND)
            if UNIT and GATE < 2:
                qk *= of_q1[:, None] * of_k0[None, :]
                rk *= of_k1[:, None] * of_k0[None, :]
            if STEPPED and KIND == 0:
                qk *= taken0[None, :]
            put(qk_out, i + H, i, qk, ok_s, C)
            put(qk_out, i, i + H, none, ok_t, C)
            if KIND == 1:
                rate0 = rates(beta, t, beta_t, ok_t, beta_scale, FUSED)
                rate1 = rates(beta, s, beta_t, ok_s, beta_scale, FUSED)
                below = mm_fine(x1, mm_fine(rate1[:, None] * rk, x0, DT, PRECISION), DT, PRECISION)
                put_system(solve_out, low_out, i + H, i, -below * rate0[None, :], ok_s, C, DT)
            if KIND == 2:
                below = mm_fine(x1, mm_fine(ra, x0, DT, PRECISION), DT, PRECISION)
                put_system(solve_out, low_out, i + H, i, below, ok_s, C, DT)
                of_rows = mm_fine(x1, rk, DT, PRECISION) + mm_fine(below, rk0, DT, PRECISION)
                put(rk_out, i + H, i, of_rows, ok_s, C)
                put(qa_out, i + H, i, qa, ok_s, C)
                put(rk_out, i, i + H, none, ok_t, C)
                put(qa_out, i, i + H, none, ok_t, C)
            if KIND > 0:
                put_system(solve_out, low_out, i, i + H, none, ok_t, C, DT)
    if FUSED and KIND == 2 and STEPPED:
        at_v = batch * v_b + first * v_t + head * v_h
        mixed = (v + at_v, log_rate + at_v, step_bias + at_v)
        put_values(mixed, v_rows + token * V, begin, length, i, v_t, HV, V, BV, H, HALVES)
