// Gates, norms and shifts of many tokens, of one instruction set. Compiled once for each, as variant.cpp is.
#include "block.hpp"

#include "entry.hpp"
#include "mixer.hpp"

namespace linstate::LINSTATE_VARIANT {
namespace {

using Decay = MixerCall::Decay;

void unit(const Output& to, const Sequence& from, const MixerCall& call, Size row, Size at, float* x) {
    const Size K = call.k, kp = round_up(K, W);
    for (Size h = 0; h < call.hk; ++h) {
        read_row(x, from.data, from.dtype, row * from.batch + at + h * K, K, kp, 1.0f);
        multiply(x, 1.0f / __builtin_sqrtf(dot(x, x, kp) + call.unit_eps), kp);
        write_row(to.data, to.dtype, row * to.batch + h * K, x, K);
    }
}

void gates(const MixerGates& work, Size first, Size last, void* scratch) {
    const FlushDenormals flush;
    const MixerCall& c = work.mixer;
    const Size K = c.k, V = c.v, group = c.hv / c.hk, per_head = round_up(c.hv, W);
    const Size steps_n = c.decay == Decay::head ? c.hv : c.hk * K, steps_p = round_up(steps_n, W) + W;
    Arena arena(scratch);
    float *steps = arena.floats(steps_p), *bias = arena.floats(steps_p), *rate = arena.floats(per_head);
    float *x = arena.floats(round_up(K > V ? K : V, W)), *of_head = arena.floats(per_head);
    // What is the same for every token.
    if (c.rate.data) {
        read_row(rate, c.rate.data, c.rate.dtype, 0, c.hv, per_head, 1.0f);
        for (Size h = 0; h < per_head; h += W) store(rate + h, exp(load(rate + h)));
    }
    zero(bias, steps_p);
    if (c.step_bias.data) read_row(bias, c.step_bias.data, c.step_bias.dtype, 0, steps_n, steps_p, 1.0f);
    for (Size row = first; row < last; ++row) {
        if (work.q.data) unit(work.q, c.mixed, c, row, c.q_at, x);
        if (work.key.data) c.key.data ? unit(work.key, c.key, c, row, 0, x) : unit(work.key, c.mixed, c, row, c.k_at, x);
        if (work.beta.data) {
            read_row(of_head, c.beta.data, c.beta.dtype, row * c.beta.batch, c.hv, per_head, 1.0f);
            for (Size h = 0; h < per_head; h += W) store(of_head + h, sigmoid(load(of_head + h)) * c.beta_scale);
            write_row(work.beta.data, work.beta.dtype, row * work.beta.batch, of_head, c.hv);
        }
        if (!work.g.data) continue;
        if (c.step.data)
            read_row(steps, c.step.data, c.step.dtype, row * c.step.batch, steps_n, steps_p, 1.0f);
        else
            zero(steps, steps_p);
        const Size g_at = row * work.g.batch;
        if (c.decay == Decay::head) {
            for (Size h = 0; h < per_head; h += W) {
                const F step = softplus(load(steps + h) + load(bias + h));
                store(of_head + h, min(max(step, all(c.step_low)), all(c.step_high)));
            }
            if (work.value.data)
                for (Size h = 0; h < c.hv; ++h) {
                    const Sequence& v = c.mixed;
                    read_row(x, v.data, v.dtype, row * v.batch + c.v_at + h * V, V, round_up(V, W), of_head[h]);
                    write_row(work.value.data, work.value.dtype, row * work.value.batch + h * V, x, V);
                }
            for (Size h = 0; h < per_head; h += W) store(of_head + h, -load(rate + h) * load(of_head + h));
            write_row(work.g.data, work.g.dtype, g_at, of_head, c.hv);
        } else if (c.decay == Decay::channel) {
            for (Size i = 0; i < steps_n; i += W) store(steps + i, softplus(load(steps + i) + load(bias + i)));
            for (Size h = 0; h < c.hv; ++h) {
                const F r = all(-rate[h]);
                const float* of_key = steps + h / group * K;
                for (Size i = 0; i < K; i += W) store(x + i, load(of_key + i) * r);
                write_row(work.g.data, work.g.dtype, g_at + h * K, x, K);
            }
        } else {
            for (Size i = 0; i < steps_n; i += W) {
                const F raw = load(steps + i) + load(bias + i);
                if (c.decay == Decay::sigmoid)
                    store(steps + i, (min(raw, F{}) - log1p_unit(exp(bits(bits(raw) | 0x80000000u)))) / c.divisor);
                else
                    store(steps + i, -exp(raw));
            }
            write_row(work.g.data, work.g.dtype, g_at, steps, steps_n);
        }
    }
}

void finish(const MixerFinish& work, Size first, Size last, void* scratch) {
    const FlushDenormals flush;
    const MixerCall& c = work.mixer;
    const Size V = c.v, group = c.hv / c.hk, n = group * V, whole = round_up(n, W) + round_up(V, W);
    Arena arena(scratch);
    float *out = arena.floats(whole), *z = arena.floats(whole), *room = arena.floats(whole);
    for (Size row = first; row < last; ++row)
        for (Size from = 0; from < c.hv; from += group) {
            read_row(out, work.made.data, work.made.dtype, row * work.made.batch + from * V, n, whole, 1.0f);
            if (c.skip.data)
                for (Size h = 0; h < group; ++h) {
                    const float factor = read_one(c.skip.data, c.skip.dtype, from + h);
                    const Size at = row * c.mixed.batch + c.v_at + (from + h) * V;
                    read_row(room, c.mixed.data, c.mixed.dtype, at, V, round_up(V, W), factor);
                    for (Size i = 0; i < V; i += W) store(out + h * V + i, load(out + h * V + i) + load(room + i));
                }
            MixerStep::finish(c, row, from, group, out, z, room);
        }
}

void shift(const ShiftTokens& work, Size first, Size last, void* scratch) {
    const FlushDenormals flush;
    const ShiftCall& c = work.shift;
    const Size n = c.n, padded = round_up(n, W);
    Arena arena(scratch);
    float *x = arena.floats(padded), *change = arena.floats(padded), *mix = arena.floats(padded);
    for (Size row = first; row < last; ++row) {
        read_row(x, c.x.data, c.x.dtype, row * c.x.batch, n, padded, 1.0f);
        if (row % work.tokens)
            read_row(change, c.x.data, c.x.dtype, (row - 1) * c.x.batch, n, padded, 1.0f);
        else if (c.before)
            read_row(change, c.before, Dtype::f32, row / work.tokens * n, n, padded, 1.0f);
        else
            zero(change, padded);
        for (Size i = 0; i < padded; i += W) store(change + i, load(change + i) - load(x + i));
        for (Size m = 0; m < c.count; ++m) {
            read_row(mix, c.mix.data, c.mix.dtype, m * n, n, padded, 1.0f);
            for (Size i = 0; i < padded; i += W) store(mix + i, load(x + i) + load(change + i) * load(mix + i));
            write_row(c.out.data, c.out.dtype, m * c.out.time + row * c.out.batch, mix, n);
        }
    }
}

void rwkv7_gates(const Rwkv7Gates& work, Size first, Size last, void* scratch) {
    const FlushDenormals flush;
    const Rwkv7Call& c = work.mixer;
    const Size n = c.size, padded = round_up(n, W);
    Arena arena(scratch);
    float *key = arena.floats(padded), *value = arena.floats(padded), *rate = arena.floats(padded), *b = arena.floats(padded),
          *other = arena.floats(padded), *room = arena.floats(padded);
    for (Size row = first; row < last; ++row)
        for (Size at = 0; at < c.heads * n; at += n) {
            const auto token = [&](float* to, const Sequence& s) {
                read_row(to, s.data, s.dtype, row * s.batch + at, n, padded, 1.0f);
            };
            const auto write = [&](const Output& o, const float* from) { write_row(o.data, o.dtype, row * o.batch + at, from, n); };
            token(room, c.decay);
            for (Size i = 0; i < padded; i += W) store(room + i, sigmoid(load(room + i)) * -0.60653066f);  // e^-1/2
            write(work.g, room);
            if (work.value.data) {
                token(value, c.value), token(room, c.value_rate), token(other, c.first_value);
                for (Size i = 0; i < padded; i += W) {
                    const F v = load(value + i);
                    store(value + i, v + (load(other + i) - v) * sigmoid(load(room + i)));
                }
                write(work.value, value);
            }
            token(key, c.key), token(rate, c.rate);
            read_row(room, c.k_k.data, c.k_k.dtype, at, n, padded, 1.0f);
            read_row(other, c.k_a.data, c.k_a.dtype, at, n, padded, 1.0f);
            for (Size i = 0; i < padded; i += W) store(b + i, load(key + i) * load(room + i));
            multiply(b, 1.0f / __builtin_sqrtf(dot(b, b, padded) + 1e-12f), padded);
            write(work.b, b);
            for (Size i = 0; i < padded; i += W) {
                const F r = sigmoid(load(rate + i));
                store(b + i, -r * load(b + i));
                store(key + i, load(key + i) * ((r - 1.0f) * load(other + i) + 1.0f));
            }
            write(work.a, b), write(work.key, key);
        }
}

void rwkv7_finish(const Rwkv7Finish& work, Size first, Size last, void* scratch) {
    const FlushDenormals flush;
    const Rwkv7Call& c = work.mixer;
    const Size n = c.size, padded = round_up(n, W);
    Arena arena(scratch);
    float *out = arena.floats(padded), *x = arena.floats(padded), *room = arena.floats(padded), *gate = arena.floats(padded);
    for (Size row = first; row < last; ++row)
        for (Size at = 0; at < c.heads * n; at += n) {
            const auto token = [&](float* to, const Sequence& s) {
                read_row(to, s.data, s.dtype, row * s.batch + at, n, padded, 1.0f);
            };
            token(out, work.made);
            norm_of_head(out, n, c.eps, c.weight, c.bias, at, room);
            read_row(room, c.r_k.data, c.r_k.dtype, at, n, padded, 1.0f);
            token(x, c.r);
            multiply(room, x, padded);
            token(x, c.key);
            const float bonus = dot(room, x, padded);
            token(x, c.value), token(gate, c.gate);
            for (Size i = 0; i < padded; i += W) store(out + i, (load(out + i) + load(x + i) * bonus) * load(gate + i));
            write_row(c.out.data, c.out.dtype, row * c.out.batch + at, out, n);
        }
}

void stream(const StreamCall& c, Size first, Size last, void*) {
    const FlushDenormals flush;
    const Size end = last * STREAM_ROW < c.n ? last * STREAM_ROW : c.n;
    Size i = first * STREAM_ROW;
    for (; i + W <= end; i += W) store(c.out + i, load(c.x + i) + load_bf16(c.y + i));
    for (; i < end; ++i) c.out[i] = c.x[i] + from_bf16(c.y[i]);
}

}  // namespace

const BlockKernels between = {&gates, &finish, &shift, &rwkv7_gates, &rwkv7_finish, &stream};

}  // namespace linstate::LINSTATE_VARIANT
