// One token of a mixer between its projections, for the value heads that share one key head.
//
// A task makes its own channels of the convolution and writes their part of its state, so tasks need nothing of each
// other, and what passes between the stages stays in the first-level cache.
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

struct MixerStep {
    static std::size_t scratch(const MixerCall& call) {
        const Size group = call.hv / call.hk, kp = round_up(call.k, W), vp = round_up(call.v, W);
        const Size all_values = round_up(group * call.v, W) + vp;
        return StepVectors::bytes(call.k, call.v) + std::size_t(kp + vp + 3 * all_values) * 4 + 64 * 6;
    }

    static void run(const MixerCall& call, Size row, Size key_head, void* memory) {
        using Decay = MixerCall::Decay;
        const Size K = call.k, V = call.v, kp = round_up(K, W), vp = round_up(V, W);
        const Size group = call.hv / call.hk, first = key_head * group;
        const Size whole = round_up(group * V, W), room = whole + vp;  // a head's vectors may reach behind the last
        if (key_head == 0) fetch(call, row, 0);
        if (key_head + 1 < call.hk) fetch(call, row, key_head + 1);
        Arena arena(memory);
        const StepVectors x(arena, K, V);
        float *steps = arena.floats(kp), *none = arena.floats(vp);
        float *values = arena.floats(room), *out = arena.floats(room), *z = arena.floats(room);
        zero(none, vp);
        channels(call, row, call.q_at + key_head * K, K, kp, x.q);
        channels(call, row, call.k_at + key_head * K, K, kp, x.key);
        channels(call, row, call.v_at + first * V, group * V, whole, values);
        float q_scale = call.scale;
        if (call.unit_eps >= 0.0f) {
            q_scale /= __builtin_sqrtf(dot(x.q, x.q, kp) + call.unit_eps);
            multiply(x.key, 1.0f / __builtin_sqrtf(dot(x.key, x.key, kp) + call.unit_eps), kp);
        }
        multiply(x.q, q_scale, kp);
        if (call.decay == Decay::channel || call.decay == Decay::sigmoid) {
            read(steps, call.step, row, key_head * K, K, kp);
            if (call.decay == Decay::channel) {
                read(x.decay, call.step_bias, 0, key_head * K, K, kp);
                for (Size c = 0; c < kp; c += W) store(steps + c, softplus(load(steps + c) + load(x.decay + c)));
            } else {
                for (Size c = 0; c < kp; c += W) {
                    const F raw = load(steps + c);
                    const F log = min(raw, F{}) - log1p_unit(exp(bits(bits(raw) | 0x80000000u)));
                    store(x.decay + c, exp(log / call.divisor));
                }
            }
        }
        for (Size h = 0; h < group; ++h) {
            const Size head = first + h, number = row * call.hv + head;
            float step = 1.0f;
            if (call.decay == Decay::head) {
                const float raw = one(call.step, row, head) + one(call.step_bias, 0, head);
                step = softplus(all(raw))[0];
                step = step < call.step_low ? call.step_low : (step > call.step_high ? call.step_high : step);
            }
            if (call.decay == Decay::head || call.decay == Decay::channel) {
                const F rate = exp(all(one(call.rate, 0, head)));
                for (Size c = 0; c < kp; c += W)
                    store(x.decay + c, exp(-rate * (call.decay == Decay::head ? all(step) : load(steps + c))));
            }
            for (Size c = 0; c < vp; c += W) store(x.value + c, load(values + h * V + c));
            for (Size c = V; c < vp; ++c) x.value[c] = 0.0f;
            if (call.stepped_values) multiply(x.value, step, vp);
            StatePass state;
            state.k = K, state.columns = V;
            state.before = call.before ? call.before + number * K * V : none, state.before_stride = call.before ? V : 0;
            state.after = call.after + number * K * V, state.after_stride = V;
            const TokenUpdate update(state, x, call.decay != Decay::none);
            if (call.update == MixerCall::Update::delta_rule)
                update.delta_rule(sigmoid(all(one(call.beta, row, head)))[0] * call.beta_scale);
            else
                update.linear_attention(nullptr);
            if (call.skip.data) update.add(x.out, one(call.skip, 0, head), values + h * V);
            for (Size c = 0; c < vp; c += W) store(out + h * V + c, load(x.out + c));  // in rising order: what reaches over is overwritten
        }
        for (Size c = group * V; c < whole; ++c) out[c] = 0.0f;
        if (call.gate != MixerCall::OutputGate::none) {
            read(z, call.z, row, first * V, group * V, whole);
            for (Size c = 0; c < whole; c += W) {
                const F s = sigmoid(load(z + c));
                store(z + c, call.gate == MixerCall::OutputGate::silu ? load(z + c) * s : s);
            }
            if (call.gate_first) multiply(out, z, whole);
        }
        normalise(call, first, group, whole, out, values);
        if (call.gate != MixerCall::OutputGate::none && !call.gate_first) multiply(out, z, whole);
        write_row(call.out.data, call.out.dtype, row * call.out.batch + first * V, out, group * V);
    }

   private:
    static float one(const Sequence& s, Size row, Size at) { return read_one(s.data, s.dtype, row * s.batch + at); }
    static void read(float* to, const Sequence& s, Size row, Size at, Size n, Size padded) {
        read_row(to, s.data, s.dtype, row * s.batch + at, n, padded, 1.0f);
    }

    // What a head's convolution reads lies in many short rows, which nothing but a hint brings in time: a head early.
    static void fetch(const MixerCall& call, Size row, Size key_head) {
        if (!call.taps) return;
        const Size K = call.k, values = call.hv / call.hk * call.v;
        fetch_channels(call, row, call.q_at + key_head * K, K);
        fetch_channels(call, row, call.k_at + key_head * K, K);
        fetch_channels(call, row, call.v_at + key_head * values, values);
    }
    static void fetch_channels(const MixerCall& call, Size row, Size at, Size n) {
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

    // rms norm and its weight; `room` is free.
    static void normalise(const MixerCall& call, Size first, Size group, Size whole, float* out, float* room) {
        const Size V = call.v;
        if (call.norm_of_group) {
            const float mean = dot(out, out, whole) / float(group * V);
            read(room, call.norm, 0, first * V, group * V, whole);
            multiply(room, 1.0f / __builtin_sqrtf(mean + call.norm_eps), whole);
            multiply(out, room, whole);
            return;
        }
        const Size vp = round_up(V, W);
        read(room, call.norm, 0, 0, V, vp);
        for (Size h = 0; h < group; ++h) {
            float* o = out + h * V;
            F s = F{};
            Size c = 0;
            for (; c + W <= V; c += W) s += load(o + c) * load(o + c);
            if (c < V) s += load_part(o + c, V - c) * load_part(o + c, V - c);
            const F factor = all(1.0f / __builtin_sqrtf(sum(s) / float(V) + call.norm_eps));
            for (c = 0; c + W <= V; c += W) store(o + c, load(o + c) * factor * load(room + c));
            if (c < V) store_part(o + c, load_part(o + c, V - c) * factor * load(room + c), V - c);
        }
    }

    // Channels [at, at + n) of the row, through the convolution; its state moves on by one input.
    static void channels(const MixerCall& call, Size row, Size at, Size n, Size padded, float* to) {
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
                float* after = call.tail_after + tail + c;
                if (call.tail_before) {
                    const float* before = call.tail_before + tail + c;
                    const F x0 = load(before), x1 = load(before + call.channels), x2 = load(before + 2 * call.channels);
                    s = x0 * tap[0] + (x1 * tap[1] + (x2 * tap[2] + s));
                    store(after, x1), store(after + call.channels, x2);
                } else {
                    store(after, F{}), store(after + call.channels, F{});
                }
                store(after + 2 * call.channels, x);
                store(to + c, s);
            }
        for (; c < n; ++c) {
            float s = 0.0f;
            for (Size w = 0; w + 1 < taps; ++w) {
                const Size place = tail + w * call.channels + c;
                s += one(call.weight, 0, (begin + c) * taps + w) * (call.tail_before ? call.tail_before[place] : 0.0f);
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
