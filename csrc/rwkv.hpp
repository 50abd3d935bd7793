// One token of RWKV: the shift before the projections, and RWKV-7's time mix between them.
#pragma once

#include "mixer.hpp"

namespace linstate::LINSTATE_VARIANT {

inline void token_shift(const ShiftCall& call, Size row) {
    // Blocks of a size that stays in registers' reach: x and before are read once for all rates.
    constexpr Size kBlock = 256;
    float x[kBlock], change[kBlock], mix[kBlock];
    for (Size at = 0; at < call.n; at += kBlock) {
        const Size n = call.n - at < kBlock ? call.n - at : kBlock, padded = round_up(n, W);
        read_row(x, call.x.data, call.x.dtype, row * call.x.batch + at, n, padded, 1.0f);
        if (call.before)
            read_row(change, call.before, Dtype::f32, row * call.n + at, n, padded, 1.0f);
        else
            zero(change, padded);
        for (Size c = 0; c < padded; c += W) store(change + c, load(change + c) - load(x + c));
        write_row(call.after, Dtype::f32, row * call.n + at, x, n);
        for (Size m = 0; m < call.count; ++m) {
            read_row(mix, call.mix.data, call.mix.dtype, m * call.n + at, n, padded, 1.0f);
            for (Size c = 0; c < padded; c += W) store(mix + c, load(x + c) + load(change + c) * load(mix + c));
            write_row(call.out.data, call.out.dtype, m * call.out.time + row * call.out.batch + at, mix, n);
        }
    }
}

struct Rwkv7Step {
    static std::size_t scratch(const Rwkv7Call& call) {
        return StepVectors::bytes(call.size, call.size) + std::size_t(2 * round_up(call.size, W)) * 4 + 64 * 2;
    }

    // more: the task goes on with the next head
    static void run(const Rwkv7Call& call, Size row, Size head, bool more, void* memory) {
        const Size n = call.size, at = head * n, padded = round_up(n, W), number = row * call.heads + head;
        Arena arena(memory);
        const StepVectors x(arena, n, n);
        float *room = arena.floats(padded), *other = arena.floats(padded);
        const auto token = [&](float* to, const Sequence& s) {
            read_row(to, s.data, s.dtype, row * s.batch + at, n, padded, 1.0f);
        };
        const auto weight = [&](float* to, const Sequence& s) { read_row(to, s.data, s.dtype, at, n, padded, 1.0f); };
        token(x.q, call.r), token(x.key, call.key), token(x.value, call.value);
        token(x.decay, call.decay);
        for (Size c = 0; c < padded; c += W) store(x.decay + c, exp(sigmoid(load(x.decay + c)) * -0.60653066f));  // e^-1/2
        if (call.value_rate.data) {
            token(room, call.value_rate), token(other, call.first_value);
            for (Size c = 0; c < padded; c += W) {
                const F v = load(x.value + c);
                store(x.value + c, v + (load(other + c) - v) * sigmoid(load(room + c)));
            }
        }
        // kappa in b, -a kappa in a, the key that is written in key
        weight(room, call.k_k);
        for (Size c = 0; c < padded; c += W) store(x.b + c, load(x.key + c) * load(room + c));
        multiply(x.b, 1.0f / __builtin_sqrtf(dot(x.b, x.b, padded) + 1e-12f), padded);
        token(room, call.rate), weight(other, call.k_a);
        for (Size c = 0; c < padded; c += W) {
            const F rate = sigmoid(load(room + c));
            store(x.a + c, -rate * load(x.b + c));
            store(x.key + c, load(x.key + c) * ((rate - 1.0f) * load(other + c) + 1.0f));
        }
        StatePass state;
        state.k = n, state.columns = n;
        if (!call.before) zero(other, padded);
        state.before = call.before ? call.before + number * n * n : other, state.before_stride = call.before ? n : 0;
        state.after = call.after + number * n * n, state.after_stride = n;
        state.past = call.past, state.more = more && call.before;
        TokenUpdate(state, x, true).dplr();
        norm_of_head(x.out, n, call.eps, call.weight, call.bias, at, room);
        weight(room, call.r_k);
        multiply(room, x.q, padded);
        const float bonus = dot(room, x.key, padded);
        token(room, call.gate);
        for (Size c = 0; c < padded; c += W)
            store(x.out + c, (load(x.out + c) + load(x.value + c) * bonus) * load(room + c));
        write_row(call.out.data, call.out.dtype, row * call.out.batch + at, x.out, n);
    }
};

}  // namespace linstate::LINSTATE_VARIANT
