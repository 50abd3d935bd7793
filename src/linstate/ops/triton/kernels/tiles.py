"""What ``prepare`` reads of a chunk, as the recurrence has it, and how it leaves what it made of it."""

import triton
import triton.language as tl

from linstate.ops.triton.kernels.chunk import exp, load_line, load_rows, rounded, save
from linstate.ops.triton.kernels.gates import log_sigmoid, softplus
from linstate.ops.triton.kernels.rwkv import in_type_of, log_decay, made_of_length


@triton.jit
def inverse_lengths(q, k, k_k, t, q_t, k_t, ok_t, eps, K: tl.constexpr, BK: tl.constexpr, KIND: tl.constexpr):
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
            k_k_tile = tl.load(k_k + kk, mask=ok_k, other=0.0).to(tl.float32)[None, :]
            k_a_tile = tl.load(k_a + kk, mask=ok_k, other=0.0).to(tl.float32)[None, :]
            kappa, removed, kept = made_of_length(k_tile, a_tile, k_k_tile, k_a_tile, of_k)
            r_tile = in_type_of(kappa, k_tile)
            a_tile = in_type_of(removed, k_tile)
            k_tile = in_type_of(kept, k_tile)
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
                gate = log_sigmoid(gate) / divisor
            if DECAY == 4:
                gate = -tl.exp(gate + offset)
            gate = tl.where(ok_t[:, None] & ok_k[None, :], gate, 0.0)
        gate = tl.maximum(gate, -1e5)
    return q_tile, r_tile, k_tile, a_tile, gate


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
    ending = exp(of_end)
    save(q_rows + at, q_tile * exp(of_q), ok)
    save(k_rows + at, k_tile * ending, ok)
    if KIND > 0:
        save(r_rows + at, r_tile * exp(of_r), ok)
    if KIND == 2:
        save(a_rows + at, a_tile * ending, ok)


@triton.jit
def put_lines(
    q_line,
    r_line,
    k_line,
    t,
    ok_t,
    taken,
    of_q,
    of_k,
    log_q,
    log_r,
    of_end,
    GATE: tl.constexpr,
    KIND: tl.constexpr,
):
    """What rows are multiplied with, for other gates."""
    at = t.to(tl.int64)
    if GATE == 1:
        of_q *= exp(tl.sum(log_q, axis=1))
        taken *= exp(tl.sum(of_end, axis=1))
    tl.store(q_line + at, of_q, mask=ok_t)
    tl.store(k_line + at, taken * of_k, mask=ok_t)
    if KIND > 0:
        if GATE == 1:
            of_k *= exp(tl.sum(log_r, axis=1))
        tl.store(r_line + at, of_k, mask=ok_t)
