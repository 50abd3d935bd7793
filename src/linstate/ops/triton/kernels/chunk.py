"""Chunk maths shared by the programs on a matrix state: decays, decayed scores, the triangular inverse, and their gradients.

A chunk has C tokens, C a power of two. A log gate g_t <= 0 is only ever summed over an interval, as a product with a matrix
of zeros and ones; no two sums are subtracted, so nothing cancels and ``exp`` never sees a positive number. Gates per
channel: a pair of tokens j < i meets at the level of halving at which it is parted, and the boundary between the halves is
the reference of both factors (``docs/kernels-gpu.md``).

GATE: 0 none, 1 one for each token and head ``[C]``, 2 one for each channel ``[C, K]``.
KIND: 0 linear attention, 1 delta rule, 2 diagonal plus low rank.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def exp(x):
    """``exp``, zero below 1e-38: four instructions for each fewer than with numbers below the least normal one."""
    if INTERPRETED:
        return tl.exp(x)
    else:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;",
            "=f,f",
            [x * 1.4426950408889634],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def rounded(x, DT: tl.constexpr):
    """A float32 in DT. Triton's interpreter cuts where a device rounds, and multiplies the bits of bfloat16 instead of the numbers:
    there it is the float32 that a device's bfloat16 stands for."""
    if INTERPRETED:
        if tl.bfloat16 == DT:
            bits = x.to(tl.float32).to(tl.int32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
            return bits.to(tl.float32, bitcast=True)
        else:
            return x.to(DT)
    else:
        return x.to(DT)


@triton.jit
def mm(x, y, DT: tl.constexpr, PRECISION: tl.constexpr):
    """``x @ y`` in float32; operands in DT, float32 ones by PRECISION."""
    return tl.dot(rounded(x, DT), rounded(y, DT), input_precision=PRECISION)


@triton.jit
def mm_fine(x, y, DT: tl.constexpr, PRECISION: tl.constexpr):
    """``x @ y`` of float32 operands, where errors would be solved for or subtracted: for bfloat16 in two parts each, 2^-16 off."""
    if tl.bfloat16 == DT:
        x = x.to(tl.float32)
        y = y.to(tl.float32)
        x_high = rounded(x, tl.bfloat16)
        y_high = rounded(y, tl.bfloat16)
        x_low = rounded(x - x_high.to(tl.float32), tl.bfloat16)
        y_low = rounded(y - y_high.to(tl.float32), tl.bfloat16)
        return tl.dot(x_high, y_high, acc=tl.dot(x_high, y_low, acc=tl.dot(x_low, y_high)))
    else:
        return tl.dot(x.to(tl.float32), y.to(tl.float32), input_precision=PRECISION)


@triton.jit
def save(where, x, mask):
    """Store in the type of the place."""
    tl.store(where, rounded(x, where.dtype.element_ty).to(where.dtype.element_ty), mask=mask)


@triton.jit
def load_rows(base, t, stride, columns, ok_t, ok_c):
    """``[C, D]`` as they are stored, for want of registers: rows t of a sequence whose last axis is dense, zeros where a mask says no."""
    where = base + t.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(where, mask=ok_t[:, None] & ok_c[None, :], other=0.0)


@triton.jit
def load_line(base, t, stride, ok_t):
    """``[C]`` in float32."""
    return tl.load(base + t.to(tl.int64) * stride, mask=ok_t, other=0.0).to(tl.float32)


@triton.jit
def load_gate(base, t, stride, columns, ok_t, ok_c, GATE: tl.constexpr):
    """Log gates ``[C]`` or ``[C, K]``; below -1e5, where the factor is zero long since, they are cut, so that 0 * inf is nowhere."""
    if GATE == 2:
        g = load_rows(base, t, stride, columns, ok_t, ok_c).to(tl.float32)
    else:
        g = load_line(base, t, stride, ok_t)
    return tl.maximum(g, -1e5)


@triton.jit
def split(x):
    """A float32 as three bfloat16 whose sum it is, to the last bit."""
    high = rounded(x, tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rounded(rest, tl.bfloat16)
    low = rounded(rest - middle.to(tl.float32), tl.bfloat16)
    return high, middle, low


@triton.jit
def sums(which, high, middle, low, EXACT: tl.constexpr = True):
    """``which @ x`` for a matrix of zeros and ones and x in three parts: exact products, float32 sums. Not EXACT: two parts, 2^-17 off."""
    which = tl.where(which, 1.0, 0.0).to(high.dtype)
    if EXACT:
        return tl.dot(which, high, acc=tl.dot(which, middle, acc=tl.dot(which, low)))
    else:
        return tl.dot(which, high, acc=tl.dot(which, middle))


@triton.jit
def between(g, i, STRICT: tl.constexpr):
    """``[C, C]``: the decay from behind token j up to and with i (STRICT: up to i - 1) for j < i, else zero."""
    high, middle, low = split(tl.where(i[:, None] > i[None, :], g[:, None], 0.0))  # [t, j]
    if STRICT:
        which = i[None, :] < i[:, None]  # [i, t]
    else:
        which = i[None, :] <= i[:, None]
    return tl.where(i[:, None] > i[None, :], exp(sums(which, high, middle, low)), 0.0)


@triton.jit
def log_from_start(
    g, high, middle, low, i, GATE: tl.constexpr, STRICT: tl.constexpr, EXACT: tl.constexpr = True
):
    """The log of the decay from the chunk's begin up to and with i (STRICT: up to i - 1): ``[1, 1]``, ``[C, 1]`` or ``[C, K]``."""
    if GATE == 0:
        return tl.zeros([1, 1], tl.float32)
    else:
        if STRICT:
            which = i[None, :] < i[:, None]
        else:
            which = i[None, :] <= i[:, None]
        if GATE == 1:
            return tl.sum(tl.where(which, g[None, :], 0.0), axis=1)[:, None]
        else:
            return sums(which, high, middle, low, EXACT)


@triton.jit
def log_to_end(g, high, middle, low, i, GATE: tl.constexpr, EXACT: tl.constexpr = True):
    """The log of the decay from behind token i to the chunk's end."""
    if GATE == 0:
        return tl.zeros([1, 1], tl.float32)
    else:
        which = i[None, :] > i[:, None]
        if GATE == 1:
            return tl.sum(tl.where(which, g[None, :], 0.0), axis=1)[:, None]
        else:
            return sums(which, high, middle, low, EXACT)


@triton.jit
def from_start(g, high, middle, low, i, GATE: tl.constexpr, STRICT: tl.constexpr):
    """``exp`` of :func:`log_from_start`."""
    return exp(log_from_start(g, high, middle, low, i, GATE, STRICT))


@triton.jit
def to_end(g, high, middle, low, i, GATE: tl.constexpr):
    """``exp`` of :func:`log_to_end`."""
    return exp(log_to_end(g, high, middle, low, i, GATE))


@triton.jit
def whole(g, GATE: tl.constexpr):
    """The decay of the whole chunk: 1, ``[1, 1]`` or ``[K, 1]``."""
    if GATE == 0:
        return tl.full([1, 1], 1.0, tl.float32)
    elif GATE == 1:
        return exp(tl.sum(g, axis=0)) + tl.zeros([1, 1], tl.float32)
    else:
        return exp(tl.sum(g, axis=0))[:, None]


@triton.jit
def pairs(i, level):
    """``[C, C]``: i stands in the second half and j in the first half of the same block of ``2 << level`` tokens."""
    parted = tl.where(
        i[:, None] > i[None, :], i[:, None] ^ i[None, :], 0
    )  # its highest bit is where they part
    return (parted >> level) == 1


@triton.jit
def to_boundary(high, middle, low, i, level, STRICT: tl.constexpr, EXACT: tl.constexpr = True):
    """``[C, K]``: the decay between a token and the boundary of the halves of its block: a row's from there up to and with it
    (STRICT: up to the one before), a column's from behind it up to there."""
    of_half = ((i[:, None] ^ i[None, :]) >> level) == 0
    second = ((i >> level) & 1)[:, None] == 1
    if STRICT:
        upto = i[None, :] < i[:, None]
    else:
        upto = i[None, :] <= i[:, None]
    behind = i[None, :] > i[:, None]
    which = of_half & tl.where(second, upto, behind)
    return exp(sums(which, high, middle, low, EXACT))


@triton.jit
def diagonal(x, y, i):
    """``[C, C]`` with ``x_i . y_i`` on the diagonal."""
    return tl.where(
        i[:, None] == i[None, :], tl.sum(x.to(tl.float32) * y.to(tl.float32), axis=1)[:, None], 0.0
    )


@triton.jit
def scores_at(
    level,
    q,
    r,
    k,
    a,
    high,
    middle,
    low,
    i,
    qk,
    rk,
    qa,
    ra,
    KIND: tl.constexpr,
    BEFORE: tl.constexpr,
    DT: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
):
    """:func:`scores` with those of the pairs that part at a level."""
    near = to_boundary(high, middle, low, i, level, False, EXACT)
    pair = pairs(i, level)
    if BEFORE or KIND == 2:
        strict = to_boundary(high, middle, low, i, level, True, EXACT)
    else:
        strict = near
    if BEFORE:
        q_row = q * strict
    else:
        q_row = q * near
    k_column = tl.trans(k * near)
    qk = tl.where(pair, mm(q_row, k_column, DT, PRECISION), qk)
    if KIND > 0:
        r_row = r * strict
        rk = tl.where(pair, mm(r_row, k_column, DT, PRECISION), rk)
        if KIND == 2:
            a_column = tl.trans(a * near)
            qa = tl.where(pair, mm(q_row, a_column, DT, PRECISION), qa)
            ra = tl.where(pair, mm(r_row, a_column, DT, PRECISION), ra)
    return qk, rk, qa, ra


@triton.jit
def scores(
    q,
    r,
    k,
    a,
    g,
    high,
    middle,
    low,
    i,
    KIND: tl.constexpr,
    GATE: tl.constexpr,
    BEFORE: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    DT: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr = True,
):
    """Decayed products of rows i and columns j < i, ``[C, C]`` each: q k, r k, q a, r a (what the KIND has not is zero).

    Rows q stand behind the decay of their own token (BEFORE: before it), rows r behind it in the delta rule and before it
    in diagonal plus low rank.
    """
    qk = tl.zeros([C, C], tl.float32)
    rk = tl.zeros([C, C], tl.float32)
    qa = tl.zeros([C, C], tl.float32)
    ra = tl.zeros([C, C], tl.float32)
    if GATE < 2:
        if GATE == 1:
            of_q = between(g, i, BEFORE)
        else:
            of_q = tl.where(i[:, None] > i[None, :], 1.0, 0.0)
        qk = mm(q, tl.trans(k), DT, PRECISION) * of_q
        if KIND > 0:
            if GATE == 1 and KIND == 2:
                of_r = between(g, i, True)
            else:
                of_r = of_q
            rk = mm(r, tl.trans(k), DT, PRECISION) * of_r
            if KIND == 2:
                qa = mm(q, tl.trans(a), DT, PRECISION) * of_q
                ra = mm(r, tl.trans(a), DT, PRECISION) * of_r
    else:
        if EXACT:  # as in the gradient, where the loop would hold more registers than its masks
            for level in tl.static_range(LEVELS):
                qk, rk, qa, ra = scores_at(
                    level,
                    q,
                    r,
                    k,
                    a,
                    high,
                    middle,
                    low,
                    i,
                    qk,
                    rk,
                    qa,
                    ra,
                    KIND,
                    BEFORE,
                    DT,
                    PRECISION,
                    EXACT,
                )
        else:
            for level in tl.range(LEVELS):
                qk, rk, qa, ra = scores_at(
                    level,
                    q,
                    r,
                    k,
                    a,
                    high,
                    middle,
                    low,
                    i,
                    qk,
                    rk,
                    qa,
                    ra,
                    KIND,
                    BEFORE,
                    DT,
                    PRECISION,
                    EXACT,
                )
    return qk, rk, qa, ra


@triton.jit
def scores_gradient(
    q,
    r,
    k,
    a,
    g,
    high,
    middle,
    low,
    i,
    dqk,
    drk,
    dqa,
    dra,
    dq,
    dr,
    dk,
    da,
    KIND: tl.constexpr,
    GATE: tl.constexpr,
    BEFORE: tl.constexpr,
    LEVELS: tl.constexpr,
    DT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of :func:`scores` by q, r, k and a, added to what is there."""
    if GATE < 2:
        if GATE == 1:
            of_q = between(g, i, BEFORE)
        else:
            of_q = tl.where(i[:, None] > i[None, :], 1.0, 0.0)
        dqk = dqk * of_q
        dq += mm(dqk, k, DT, PRECISION)
        dk += mm(tl.trans(dqk), q, DT, PRECISION)
        if KIND > 0:
            if GATE == 1 and KIND == 2:
                of_r = between(g, i, True)
            else:
                of_r = of_q
            drk = drk * of_r
            dr += mm(drk, k, DT, PRECISION)
            dk += mm(tl.trans(drk), r, DT, PRECISION)
            if KIND == 2:
                dqa = dqa * of_q
                dra = dra * of_r
                dq += mm(dqa, a, DT, PRECISION)
                dr += mm(dra, a, DT, PRECISION)
                da += mm(tl.trans(dqa), q, DT, PRECISION) + mm(tl.trans(dra), r, DT, PRECISION)
    else:
        for level in tl.static_range(LEVELS):
            near = to_boundary(high, middle, low, i, level, False)
            pair = pairs(i, level)
            if BEFORE or KIND == 2:
                strict = to_boundary(high, middle, low, i, level, True)
            else:
                strict = near
            if BEFORE:
                of_q = strict
            else:
                of_q = near
            dqk_here = tl.where(pair, dqk, 0.0)
            to_q = mm(dqk_here, k * near, DT, PRECISION)
            to_k = mm(tl.trans(dqk_here), q * of_q, DT, PRECISION)
            if KIND > 0:
                drk_here = tl.where(pair, drk, 0.0)
                to_r = mm(drk_here, k * near, DT, PRECISION)
                to_k += mm(tl.trans(drk_here), r * strict, DT, PRECISION)
                if KIND == 2:
                    dqa_here = tl.where(pair, dqa, 0.0)
                    dra_here = tl.where(pair, dra, 0.0)
                    to_q += mm(dqa_here, a * near, DT, PRECISION)
                    to_r += mm(dra_here, a * near, DT, PRECISION)
                    to_a = mm(tl.trans(dqa_here), q * of_q, DT, PRECISION)
                    to_a += mm(tl.trans(dra_here), r * strict, DT, PRECISION)
                    da += near * to_a
                dr += strict * to_r
            dq += of_q * to_q
            dk += near * to_k
    return dq, dr, dk, da


@triton.jit
def unit_lower_inverse(lower, i, LEVELS: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr):
    """``(I + lower)^-1`` for a strictly lower ``[C, C]``: from inverses of blocks to those of blocks twice as large.

    ``[[A, 0], [L, B]]^-1 = [[A', 0], [-B' L A', B']]``: as stable as substitution by blocks, and all matmuls.
    """
    inverse = tl.where(i[:, None] == i[None, :], 1.0, 0.0) - tl.where(pairs(i, 0), lower, 0.0)
    for level in tl.range(
        1, LEVELS
    ):  # not unrolled: unrolled, its masks take the registers of the loop over chunks
        across = tl.where(pairs(i, level), lower, 0.0)
        inverse -= mm_fine(inverse, mm_fine(across, inverse, DT, PRECISION), DT, PRECISION)
    return inverse
