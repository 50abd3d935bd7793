// The short causal convolution, channel by channel: y_t = act(bias + sum_w weight_w x_{t - taps + 1 + w}).
//
// Rows are taken one after another; the taps - 1 rows before one are still in the first-level cache.
#pragma once

#include "chunk.hpp"

namespace linstate::LINSTATE_VARIANT {

struct ShortConvolution {
    static std::size_t scratch(Size taps, Size channels) {
        const Size cp = round_up(channels, W);
        return std::size_t((2 * taps + 2) * cp) * 4 + std::size_t(taps) * sizeof(float*) + 64 * 5;
    }

    static void run(const ConvCall& call, const ConvTask& task, void* memory) {
        if (call.taps == 4)
            run_taps<4>(call, task, memory);
        else
            run_taps<0>(call, task, memory);
    }

   private:
    template <int Taps, bool Silu>
    static LINSTATE_INLINE void row(float* to, Size taps, Size cp, const float* weight, const float* bias,
                                    const float* const* window) {
        for (Size c = 0; c < cp; c += W) {
            F s = load(bias + c);
#pragma GCC unroll 4
            for (Size w = 0; w < (Taps ? Taps : taps); ++w) s += load(weight + w * cp + c) * load(window[w] + c);
            store(to + c, Silu ? silu(s) : s);
        }
    }

    template <int Taps>
    static void run_taps(const ConvCall& call, const ConvTask& task, void* memory) {
        const Size taps = Taps ? Taps : call.taps, n = task.to - task.from, cp = round_up(n, W);
        Size batch = task.row, start = 0, tokens = call.tokens;
        if (call.bounds) batch = 0, start = call.bounds[task.row], tokens = call.bounds[task.row + 1] - start;
        Arena arena(memory);
        float *weight = arena.floats(taps * cp), *bias = arena.floats(cp), *ring = arena.floats(taps * cp),
              *y = arena.floats(cp);
        const float** window = reinterpret_cast<const float**>(arena.at);  // oldest first
        for (Size c = 0; c < cp; ++c)
            for (Size w = 0; w < taps; ++w)
                weight[w * cp + c] =
                    c < n ? read_one(call.weight, call.weight_dtype, (task.from + c) * taps + w) : 0.0f;
        if (call.bias)
            read_row(bias, call.bias, call.bias_dtype, task.from, n, cp, 1.0f);
        else
            zero(bias, cp);

        // Input t, from -(taps - 1) on: what stands before the first token is in the state.
        const auto input = [&](Size t) -> const float* {
            float* room = ring + (t + taps) % taps * cp;
            if (t < 0) {
                if (call.before)
                    read_row(room, call.before, Dtype::f32,
                             (task.row * (taps - 1) + t + taps - 1) * call.channels + task.from, n, cp, 1.0f);
                else
                    zero(room, cp);
                return room;
            }
            const Size at = batch * call.x.batch + (start + t) * call.x.time + task.from;
            if (call.x.dtype == Dtype::f32 && n == cp) return static_cast<const float*>(call.x.data) + at;
            read_row(room, call.x.data, call.x.dtype, at, n, cp, 1.0f);
            return room;
        };
        for (Size w = 1; w < taps; ++w) window[w] = input(task.first - taps + w);
        for (Size t = task.first; t < task.last; ++t) {
            for (Size w = 1; w < taps; ++w) window[w - 1] = window[w];
            window[taps - 1] = input(t);
            const Size at = batch * call.out.batch + (start + t) * call.out.time + task.from;
            const bool direct = call.out.dtype == Dtype::f32 && n == cp;
            float* to = direct ? static_cast<float*>(call.out.data) + at : y;
            if (call.silu)
                row<Taps, true>(to, taps, cp, weight, bias, window);
            else
                row<Taps, false>(to, taps, cp, weight, bias, window);
            if (!direct) write_row(call.out.data, call.out.dtype, at, y, n);
        }
        if (task.last == tokens)
            for (Size w = 0; w + 1 < taps; ++w)
                write_row(call.after, Dtype::f32, (task.row * (taps - 1) + w) * call.channels + task.from,
                          input(tokens - taps + 1 + w), n);
    }
};

}  // namespace linstate::LINSTATE_VARIANT
