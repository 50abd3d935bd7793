"""The parts of ``prepare.py``: scores within a half of a chunk, between its halves, and what rows are multiplied with at its borders.

``q`` to ``g_t`` are the pointers that ``tiles`` reads and their strides of tokens. Tuples hold what is of one half: its tokens, which of
them there are, gates and lengths; a tuple of pointers is not possible, as some may be None.
"""

import triton
import triton.language as tl

from linstate.ops.triton.kernels.chunk import (
    exp,
    load_line,
    load_rows,
    log_from_start,
    log_to_end,
    mm,
    save,
    scores,
    split,
)
from linstate.ops.triton.kernels.gates import sigmoid
from linstate.ops.triton.kernels.tiles import put_lines, put_rows, tiles

# fmt: off
# Lists of names by lines, not a name a line.

@triton.jit
def rates(beta, t, beta_t, ok, beta_scale, FUSED: tl.constexpr):
    """beta of H tokens."""
    rate = load_line(beta, t, beta_t, ok)
    if FUSED:
        rate = tl.where(ok, sigmoid(rate) * beta_scale, 0.0)
    return rate


@triton.jit
def decayed(qk, rk, qa, ra, decay, strict, KIND: tl.constexpr):
    """Scores by the decays between their tokens; ``strict``: those of the rows that read the system (diagonal plus low rank)."""
    qk *= decay
    if KIND == 2:
        qa *= decay
        ra *= strict
    rk *= strict
    return qk, rk, qa, ra


@triton.jit
def scores_of_half(
    q, k, a, b, g, k_k, k_a, of_channels, q_t, k_t, a_t, b_t, g_t, bonus, speed, divisor, gate, of_q, of_k, t, ok, i, K: tl.constexpr,
    BK: tl.constexpr, KB: tl.constexpr, H: tl.constexpr, LEVELS: tl.constexpr, KIND: tl.constexpr, GATE: tl.constexpr,
    BONUS: tl.constexpr, FUSED: tl.constexpr, DECAY: tl.constexpr, OFFSET: tl.constexpr, UNIT: tl.constexpr, DT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores below the diagonal of H tokens (q k, r k, q a, r a), and each token's q with its own k and a."""
    BY_CHANNEL: tl.constexpr = GATE if GATE == 2 else 0  # other gates are multiplied in after the loop
    EXACT: tl.constexpr = tl.bfloat16 != DT
    none = tl.zeros([H, H], tl.float32)
    qk, rk, qa, ra = none, none, none, none
    own, own_a = tl.zeros([H], tl.float32), tl.zeros([H], tl.float32)
    for column in tl.range(0, BK, KB):
        kk = column + tl.arange(0, KB)
        ok_k = kk < K
        q_tile, r_tile, k_tile, a_tile, g_tile = tiles(
            q, k, a, b, g, k_k, k_a, of_channels, speed, t, ok, kk, ok_k, q_t, k_t, a_t, b_t, g_t,
            gate, of_q, of_k, divisor, KIND, GATE, FUSED, DECAY, OFFSET, UNIT,
        )
        high, middle, low = split(g_tile)
        of_qk, of_rk, of_qa, of_ra = scores(
            q_tile, r_tile, k_tile, a_tile, g_tile, high, middle, low, i,
            KIND, BY_CHANNEL, BONUS, H, LEVELS, DT, PRECISION, EXACT,
        )
        qk += of_qk
        rk += of_rk
        qa += of_qa
        ra += of_ra
        seen = q_tile.to(tl.float32)
        if KIND == 2:
            own_a += tl.sum(seen * a_tile.to(tl.float32), axis=1)
        if BONUS:
            seen = seen * tl.load(bonus + kk, mask=ok_k, other=0.0).to(tl.float32)[None, :]
        own += tl.sum(seen * k_tile.to(tl.float32), axis=1)
    return qk, rk, qa, ra, own, own_a


@triton.jit
def put_borders(
    q_line, r_line, k_line, upper, lower, i, GATE: tl.constexpr, KIND: tl.constexpr, BONUS: tl.constexpr, HALVES: tl.constexpr,
):
    """What rows are multiplied with as the chunk's borders see them, for a gate for the head or none; returns the logs between the halves
    (from the border to q and to r of the second, from k of the first to the border) and the whole chunk's."""
    t, ok_t, taken0, of_q0, of_k0, gate0 = upper
    s, ok_s, taken1, of_q1, of_k1, gate1 = lower
    start1, before1 = 0.0, 0.0
    start0 = log_from_start(gate0, gate0, gate0, gate0, i, GATE, BONUS)
    before0 = log_from_start(gate0, gate0, gate0, gate0, i, GATE, KIND == 2)
    end0 = log_to_end(gate0, gate0, gate0, gate0, i, GATE)
    total = tl.sum(gate0, axis=0)
    if HALVES == 2:
        start1 = log_from_start(gate1, gate1, gate1, gate1, i, GATE, BONUS)
        before1 = log_from_start(gate1, gate1, gate1, gate1, i, GATE, KIND == 2)
        end1 = log_to_end(gate1, gate1, gate1, gate1, i, GATE)
        of_second = tl.sum(gate1, axis=0)
        put_lines(
            q_line, r_line, k_line, s, ok_s, taken1, of_q1, of_k1,
            start1 + total, before1 + total, end1, GATE, KIND,
        )
        put_lines(
            q_line, r_line, k_line, t, ok_t, taken0, of_q0, of_k0,
            start0, before0, end0 + of_second, GATE, KIND,
        )
        total += of_second
    else:
        put_lines(q_line, r_line, k_line, t, ok_t, taken0, of_q0, of_k0, start0, before0, end0, GATE, KIND)
    return start1, before1, end0, total


@triton.jit
def scores_below(
    q, k, a, b, g, k_k, k_a, of_channels, q_t, k_t, a_t, b_t, g_t, q_rows, r_rows, k_rows, a_rows, totals, speed, divisor, upper,
    lower, i, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, KB: tl.constexpr, H: tl.constexpr, HALVES: tl.constexpr,
    KIND: tl.constexpr, GATE: tl.constexpr, BONUS: tl.constexpr, FUSED: tl.constexpr, DECAY: tl.constexpr, OFFSET: tl.constexpr,
    UNIT: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):
    """Scores of the second half's rows and the first half's columns, by way of the border between them; for a gate for each channel
    also rows as the chunk's borders see them, and the whole chunk's decay."""
    t, ok_t, gate0, of_q0, of_k0 = upper
    s, ok_s, gate1, of_q1, of_k1 = lower
    none = tl.zeros([H, H], tl.float32)
    qk, rk, qa, ra = none, none, none, none
    for column in tl.range(0, BK, KB):
        kk = column + tl.arange(0, KB)
        ok_k = kk < K
        q0, r0, k0, a0, g0 = tiles(
            q, k, a, b, g, k_k, k_a, of_channels, speed, t, ok_t, kk, ok_k, q_t, k_t, a_t, b_t, g_t,
            gate0, of_q0, of_k0, divisor, KIND, GATE, FUSED, DECAY, OFFSET, UNIT,
        )
        if GATE == 2:
            high, middle, low = split(g0)
            start = log_from_start(g0, high, middle, low, i, GATE, BONUS, EXACT)
            before = start
            if KIND == 2:
                before = log_from_start(g0, high, middle, low, i, GATE, True, EXACT)
            end = log_to_end(g0, high, middle, low, i, GATE, EXACT)
            of_all = tl.sum(g0, axis=0)
            to_second = end
        if HALVES == 2:
            q1, r1, k1, a1, g1 = tiles(
                q, k, a, b, g, k_k, k_a, of_channels, speed, s, ok_s, kk, ok_k, q_t, k_t, a_t, b_t, g_t,
                gate1, of_q1, of_k1, divisor, KIND, GATE, FUSED, DECAY, OFFSET, UNIT,
            )
            q_row = q1
            r_row = r1
            k_row = k0
            a_row = a0
            if GATE == 2:
                of_second = tl.sum(g1, axis=0)
                to_second = end + of_second[None, :]
                near = exp(end)
                k_row = k0 * near
                a_row = a0 * near
                high, middle, low = split(g1)
                upto = log_from_start(g1, high, middle, low, i, GATE, BONUS, EXACT)
                strict = upto
                q_row = q1 * exp(upto)
                if KIND == 2:
                    strict = log_from_start(g1, high, middle, low, i, GATE, True, EXACT)
                if KIND > 0:
                    r_row = r1 * exp(strict)
                put_rows(
                    q_rows, r_rows, k_rows, a_rows, s, ok_s, kk, ok_k, q1, r1, k1, a1,
                    upto + of_all[None, :], strict + of_all[None, :],
                    log_to_end(g1, high, middle, low, i, GATE, EXACT), HV, K, KIND,
                )
                of_all += of_second
            qk += mm(q_row, tl.trans(k_row), DT, PRECISION)
            if KIND > 0:
                rk += mm(r_row, tl.trans(k_row), DT, PRECISION)
            if KIND == 2:
                qa += mm(q_row, tl.trans(a_row), DT, PRECISION)
                ra += mm(r_row, tl.trans(a_row), DT, PRECISION)
        if GATE == 2:
            put_rows(
                q_rows, r_rows, k_rows, a_rows, t, ok_t, kk, ok_k, q0, r0, k0, a0,
                start, before, to_second, HV, K, KIND,
            )
            tl.store(totals + kk, exp(of_all), mask=ok_k)
    return qk, rk, qa, ra


@triton.jit
def put_values(
    mixed, v_rows, begin, length, i, v_t, HV: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, H: tl.constexpr, HALVES: tl.constexpr,
):
    """RWKV-7's values, mixed with the first layer's by a share for each channel."""
    v, share_of, first_of = mixed
    for turn in range(0, HALVES * ((V + BV - 1) // BV)):
        of_turn = begin + turn % HALVES * H + i
        vv = turn // HALVES * BV + tl.arange(0, BV)
        ok_turn, ok_v = of_turn < length, vv < V
        found = load_rows(v, of_turn, v_t, vv, ok_turn, ok_v).to(tl.float32)
        share = sigmoid(load_rows(share_of, of_turn, v_t, vv, ok_turn, ok_v).to(tl.float32))
        other = load_rows(first_of, of_turn, v_t, vv, ok_turn, ok_v).to(tl.float32)
        where = v_rows + of_turn.to(tl.int64)[:, None] * (HV * V) + vv[None, :]
        save(where, found + (other - found) * share, ok_turn[:, None] & ok_v[None, :])
