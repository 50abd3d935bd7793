// One token of a mixer between its projections, for value heads that share one key head.
//
// A task makes its own channels of the convolution and writes their part of its state, so tasks need nothing of each
// other, and what passes between the stages stays in the first-level cache. Where tasks share a key head, each makes q and
// key anew, and the first writes their part of the state; a norm over all of them waits until they are done (finish).
#pragma once

#include "conv.hpp"
#include "step.hpp"

namespace linstate::LINSTATE_VARIANT {

// log(1 + y) for y in [0, 1]: 2 atanh(y / (2 + y)), whose series ends at 1.4e-8 as y / (2 + y) <= 1/3
LINSTATE_INLINE F log1p_unit(F y) {
    const F s = y / (y + 2.0f), t = s * s;
    F p = all(1.0f / 13.0f);
    p = p * t + 1.0f / 11.0f;
    p = p * t + 1.0f / 9.0f;
    p = p * t + 1.0f / 7.0f;
    p = p * t + 0.2f;
    p = p * t + 1.0f / 3.0f;
    p = p * t + 1.0f;
    return s * p * 2.0f;
}
LINSTATE_INLINE F softplus(F x) {
    const F e = exp(bits(bits(x) | 0x80000000u));
    return max(x, F{}) + log1p_unit(e);
}

// Mean 0 and variance 1 over n numbers, their weights from `at` on and, where there is one, their bias; `room`: whole vectors.
inline void norm_of_head(float* o, Size n, float eps, const Sequence& weight, const Sequence& bias, Size at, float* room) {
    const Size whole = n / W * W, padded = round_up(n, W);
    F total = F{};
    Size c = 0;
    for (; c < whole; c += W) total += load(o + c);
    if (c < n) total += load_part(o + c, n - c);
    const float mean = sum(total) / float(n);
    F squares = F{};
    for (c = 0; c < whole; c += W) {
        const F d = load(o + c) - mean;
        store(o + c, d), squares += d * d;
    }
    float rest = 0.0f;
    for (; c < n; ++c) o[c] -= mean, rest += o[c] * o[c];
    const float factor = 1.0f / __builtin_sqrtf((sum(squares) + rest) / float(n) + eps);
    read_row(room, weight.data, weight.dtype, at, n, padded, factor);
    for (c = 0; c < whole; c += W) store(o + c, load(o + c) * load(room + c));
    for (; c < n; ++c) o[c] *= room[c];
    if (!bias.data) return;
    read_row(room, bias.data, bias.dtype, at, n, padded, 1.0f);
    for (c = 0; c < whole; c += W) store(o + c, load(o + c) + load(room + c));
    for (; c < n; ++c) o[c] += room[c];
}

struct MixerStep {
    static std::size_t scratch(const MixerCall& call) {
        const Size group = call.hv / call.hk, kp = round_up(call.k, W), vp = round_up(call.columns(), W);
        const Size all_values = round_up(group * call.v, W) + vp;
        return StepVectors::bytes(call.k, call.columns()) + std::size_t(kp + vp + 3 * all_values) * 4 + 64 * 6;
    }

    // Value heads [from, to) of those that share the key head; `more`: the task goes on with the next ones.
    static void run(const MixerCall& call, Size row, Size key_head, Size from, Size to, bool more, void* memory) {
        using Decay = MixerCall::Decay;
        const Size K = call.k, V = call.v, columns = call.columns(), kp = round_up(K, W), vp = round_up(columns, W);
        const Size group = to - from, first = key_head * (call.hv / call.hk) + from;
        const Size whole = round_up(group * V, W), room = whole + vp;  // a head's vectors may reach behind the last
        if (key_head == 0 || group < call.hv / call.hk) fetch(call, row, key_head, first, group);
        if (key_head + 1 < call.hk && group == call.hv / call.hk) fetch(call, row, key_head + 1, first + group, group);
        Arena arena(memory);
        const StepVectors x(arena, K, columns);
        float *steps = arena.floats(kp), *none = arena.floats(vp);
        float *values = arena.floats(room), *out = arena.floats(room), *z = arena.floats(room);
        zero(none, vp);
        const bool keeps = from == 0;
        channels(call, row, call.q_at + key_head * K, K, kp, x.q, keeps);
        if (call.key.data)
            read(x.key, call.key, row, key_head * K, K, kp);
        else
            channels(call, row, call.k_at + key_head * K, K, kp, x.key, keeps);
        if (call.value.data)
            read(values, call.value, row, first * V, group * V, whole);
        else
            channels(call, row, call.v_at + first * V, group * V, whole, values, true);
        if (call.elu_plus_one) elu_plus_one(x.q, K), elu_plus_one(x.key, K);
        if (call.turn) turn(call.turn + row * K, K, x.q), turn(call.turn + row * K, K, x.key);
        float q_scale = call.scale;
        if (call.unit_eps >= 0.0f) {
            q_scale /= __builtin_sqrtf(dot(x.q, x.q, kp) + call.unit_eps);
            multiply(x.key, 1.0f / __builtin_sqrtf(dot(x.key, x.key, kp) + call.unit_eps), kp);
        }
        multiply(x.q, q_scale, kp);
        channel_decays(call, row, key_head, steps, x.decay);
        for (Size h = 0; h < group; ++h) {
            const Size head = first + h, number = row * call.hv + head;
            float step = 1.0f;
            if (call.decay == Decay::head) {
                const float raw = one(call.step, row, head) + one(call.step_bias, 0, head);
                step = softplus(all(raw))[0];
                step = step < call.step_low ? call.step_low : (step > call.step_high ? call.step_high : step);
            }
            if (call.decay == Decay::head || call.decay == Decay::channel) {
                const F rate = exp(all(one(call.rate, 0, head))), same = exp(-rate * step);
                for (Size c = 0; c < kp; c += W)
                    store(x.decay + c, call.decay == Decay::head ? same : exp(-rate * load(steps + c)));
            } else if (call.decay == Decay::fixed) {
                const F d = exp(all(one(call.rate, 0, head)));
                for (Size c = 0; c < kp; c += W) store(x.decay + c, d);
            }
            for (Size c = 0; c < vp; c += W) store(x.value + c, load(values + h * V + c));
            for (Size c = V; c < vp; ++c) x.value[c] = 0.0f;
            if (call.stepped_values) multiply(x.value, step, vp);
            if (columns > V) x.value[V] = 1.0f;
            StatePass state;
            state.k = K, state.columns = columns;
            state.before = call.before ? call.before + number * K * columns : none;
            state.before_stride = call.before ? columns : 0;
            state.after = call.after + number * K * columns, state.after_stride = columns;
            state.past = call.past, state.more = call.before && (more || h + 1 < group);
            const TokenUpdate update(state, x, call.decay != Decay::none);
            if (call.update == MixerCall::Update::delta_rule) {
                update.delta_rule(sigmoid(all(one(call.beta, row, head)))[0] * call.beta_scale);
            } else if (call.bonus.data) {
                read(x.b, call.bonus, 0, head * K, K, kp);
                update.linear_attention(x.b);
            } else {
                update.linear_attention(nullptr);
            }
            if (columns > V) multiply(x.out, 1.0f / (x.out[V] + call.normaliser_eps), vp);
            if (call.skip.data) update.add(x.out, one(call.skip, 0, head), values + h * V);
            for (Size c = 0; c < vp; c += W) store(out + h * V + c, load(x.out + c));  // in rising order: what reaches over is overwritten
        }
        if (call.raw) {
            for (Size c = 0; c < group * V; ++c) call.raw[row * call.hv * V + first * V + c] = out[c];
            return;
        }
        finish(call, row, first, group, out, z, values);
    }

    // What is left where the outputs of a key head's tasks stand in call.raw.
    static void finish(const MixerCall& call, Size row, Size key_head, void* memory) {
        const Size group = call.hv / call.hk, first = key_head * group, whole = round_up(group * call.v, W);
        Arena arena(memory);
        float *out = arena.floats(whole), *z = arena.floats(whole), *room = arena.floats(whole + round_up(call.v, W));
        read_row(out, call.raw, Dtype::f32, (row * call.hv + first) * call.v, group * call.v, whole, 1.0f);
        finish(call, row, first, group, out, z, room);
    }

    // Gate and norm of the value heads from `first` on; `z` and `room` are free.
    static void finish(const MixerCall& call, Size row, Size first, Size group, float* out, float* z, float* room) {
        const Size V = call.v, whole = round_up(group * V, W);
        for (Size c = group * V; c < whole; ++c) out[c] = 0.0f;
        if (call.gate != MixerCall::OutputGate::none) {
            read(z, call.z, row, first * V, group * V, whole);
            for (Size c = 0; c < whole; c += W) {
                const F s = sigmoid(load(z + c));
                store(z + c, call.gate == MixerCall::OutputGate::silu ? load(z + c) * s : s);
            }
            if (call.gate_first) multiply(out, z, whole);
        }
        normalise(call, first, group, whole, out, room);
        if (call.gate != MixerCall::OutputGate::none && !call.gate_first) multiply(out, z, whole);
        write_row(call.out.data, call.out.dtype, row * call.out.batch + first * V, out, group * V);
    }

   private:
    static float one(const Sequence& s, Size row, Size at) { return read_one(s.data, s.dtype, row * s.batch + at); }
    static void read(float* to, const Sequence& s, Size row, Size at, Size n, Size padded) {
        read_row(to, s.data, s.dtype, row * s.batch + at, n, padded, 1.0f);
    }

    // What a head's convolution reads lies in many short rows, which nothing but a hint brings in time: a head early.
    static LINSTATE_INLINE void fetch(const MixerCall& call, Size row, Size key_head, Size first, Size group) {
        if (!call.taps) return;
        const Size K = call.k;
        fetch_channels(call, row, call.q_at + key_head * K, K);
        fetch_channels(call, row, call.k_at + key_head * K, K);
        fetch_channels(call, row, call.v_at + first * call.v, group * call.v);
    }
    static LINSTATE_INLINE void fetch_channels(const MixerCall& call, Size row, Size at, Size n) {
        const Size begin = at - call.conv_at, width = call.taps * (call.weight.dtype == Dtype::f32 ? 4 : 2);
        const char* weight = static_cast<const char*>(call.weight.data) + begin * width;
        for (Size byte = 0; byte < n * width; byte += 64) __builtin_prefetch(weight + byte);
        for (Size w = 0; w + 1 < call.taps; ++w) {
            const Size tail = (row * (call.taps - 1) + w) * call.channels + begin;
            for (Size c = 0; c < n; c += 16) {
                if (call.tail_before) __builtin_prefetch(call.tail_before + tail + c);
                __builtin_prefetch(call.tail_after + tail + c, 1);
            }
        }
    }

    // The decays that all heads of a key head share; under Decay::channel the steps, whose rates are the heads'.
    static void channel_decays(const MixerCall& call, Size row, Size key_head, float* steps, float* decay) {
        using Decay = MixerCall::Decay;
        const Size K = call.k, kp = round_up(K, W), at = key_head * K;
        if (call.decay != Decay::channel && call.decay != Decay::sigmoid && call.decay != Decay::exponential) return;
        if (call.step.data)
            read(steps, call.step, row, at, K, kp);
        else
            zero(steps, kp);
        if (call.decay == Decay::sigmoid) {
            for (Size c = 0; c < kp; c += W) {
                const F raw = load(steps + c);
                const F log = min(raw, F{}) - log1p_unit(exp(bits(bits(raw) | 0x80000000u)));
                store(decay + c, exp(log / call.divisor));
            }
            return;
        }
        read(decay, call.step_bias, 0, at, K, kp);
        for (Size c = 0; c < kp; c += W) {
            const F raw = load(steps + c) + load(decay + c);
            if (call.decay == Decay::channel)
                store(steps + c, softplus(raw));
            else
                store(decay + c, exp(-exp(raw)));
        }
    }

    static void elu_plus_one(float* x, Size n) {
        for (Size c = 0; c < n; c += W) {
            const F raw = load(x + c);
            store(x + c, select(raw > 0.0f, raw + 1.0f, exp(min(raw, F{}))));
        }
        for (Size c = n; c < round_up(n, W); ++c) x[c] = 0.0f;
    }

    // Channels i and i + K / 2 by the angles whose cosines and sines are in `turns`.
    static void turn(const float* turns, Size K, float* x) {
        const Size half = K / 2;
        for (Size c = 0; c < half; ++c) {
            const float first = x[c], second = x[half + c];
            x[c] = first * turns[c] - second * turns[half + c];
            x[half + c] = second * turns[c] + first * turns[half + c];
        }
    }

    // The norm and its weights; `room` is free.
    static void normalise(const MixerCall& call, Size first, Size group, Size whole, float* out, float* room) {
        using Norm = MixerCall::Norm;
        const Size V = call.v, vp = round_up(V, W);
        if (call.norm == Norm::none) return;
        if (call.norm == Norm::group) {
            const float mean = dot(out, out, whole) / float(group * V);
            read(room, call.norm_weight, 0, first * V, group * V, whole);
            multiply(room, 1.0f / __builtin_sqrtf(mean + call.norm_eps), whole);
            multiply(out, room, whole);
            return;
        }
        if (call.norm == Norm::head) read(room, call.norm_weight, 0, 0, V, vp);
        for (Size h = 0; h < group; ++h) {
            float* o = out + h * V;
            if (call.norm == Norm::centred) {
                norm_of_head(o, V, call.norm_eps, call.norm_weight, call.norm_bias, (first + h) * V, room);
                continue;
            }
            F s = F{};
            Size c = 0;
            for (; c + W <= V; c += W) s += load(o + c) * load(o + c);
            if (c < V) s += load_part(o + c, V - c) * load_part(o + c, V - c);
            const F factor = all(1.0f / __builtin_sqrtf(sum(s) / float(V) + call.norm_eps));
            for (c = 0; c + W <= V; c += W) store(o + c, load(o + c) * factor * load(room + c));
            if (c < V) store_part(o + c, load_part(o + c, V - c) * factor * load(room + c), V - c);
        }
    }

    // Channels [at, at + n) of the row, through the convolution; its state moves on by one input if this task `keeps` it.
    static void channels(const MixerCall& call, Size row, Size at, Size n, Size padded, float* to, bool keeps) {
        read(to, call.mixed, row, at, n, padded);
        if (!call.taps) return;
        const Size taps = call.taps, begin = at - call.conv_at;
        const Size tail = row * (taps - 1) * call.channels + begin;
        Size c = 0;
        if (taps == 4 && call.weight.dtype == Dtype::f32)
            for (; c + W <= n; c += W) {
                F tap[4];
                taps4(static_cast<const float*>(call.weight.data) + (begin + c) * 4, tap);
                const F x = load(to + c);
                F s = x * tap[3];
                F x1 = F{}, x2 = F{};
                if (call.tail_before) {
                    const float* before = call.tail_before + tail + c;
                    const F x0 = load(before);
                    x1 = load(before + call.channels), x2 = load(before + 2 * call.channels);
                    s = x0 * tap[0] + (x1 * tap[1] + (x2 * tap[2] + s));
                }
                if (keeps) {
                    float* after = call.tail_after + tail + c;
                    store(after, x1), store(after + call.channels, x2), store(after + 2 * call.channels, x);
                }
                store(to + c, s);
            }
        for (; c < n; ++c) {
            float s = 0.0f;
            for (Size w = 0; w + 1 < taps; ++w) {
                const Size place = tail + w * call.channels + c;
                s += one(call.weight, 0, (begin + c) * taps + w) * (call.tail_before ? call.tail_before[place] : 0.0f);
                if (!keeps) continue;
                call.tail_after[place] = w + 2 == taps        ? to[c]
                                         : !call.tail_before ? 0.0f
                                                             : call.tail_before[place + call.channels];
            }
            to[c] = s + one(call.weight, 0, (begin + c) * taps + taps - 1) * to[c];
        }
        if (call.bias.data)
            for (c = 0; c < n; ++c) to[c] += one(call.bias, 0, begin + c);
        for (c = 0; c < padded; c += W) store(to + c, silu(load(to + c)));
    }
};

}  // namespace linstate::LINSTATE_VARIANT
