// The short causal convolution, channel by channel: y_t = act(bias + sum_w weight_w x_{t - taps + 1 + w}).
//
// Rows are taken one after another; the taps - 1 rows before one are still in the first-level cache.
#pragma once

#include "chunk.hpp"

namespace linstate::LINSTATE_VARIANT {

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define LINSTATE_SHUFFLES 1
#endif
#endif

#if defined(LINSTATE_SHUFFLES)
#if LINSTATE_LANES == 4
#define LINSTATE_EVENS 0, 2, 4, 6
#define LINSTATE_ODDS 1, 3, 5, 7
#elif LINSTATE_LANES == 8
#define LINSTATE_EVENS 0, 2, 4, 6, 8, 10, 12, 14
#define LINSTATE_ODDS 1, 3, 5, 7, 9, 11, 13, 15
#else
#define LINSTATE_EVENS 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define LINSTATE_ODDS 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#endif
// Four taps of W channels, [W, 4] in memory, to one vector for each tap.
LINSTATE_INLINE void taps4(const float* p, F (&tap)[4]) {
    const F a = load(p), b = load(p + W), c = load(p + 2 * W), d = load(p + 3 * W);
    const F even0 = __builtin_shufflevector(a, b, LINSTATE_EVENS), odd0 = __builtin_shufflevector(a, b, LINSTATE_ODDS);
    const F even1 = __builtin_shufflevector(c, d, LINSTATE_EVENS), odd1 = __builtin_shufflevector(c, d, LINSTATE_ODDS);
    tap[0] = __builtin_shufflevector(even0, even1, LINSTATE_EVENS);
    tap[1] = __builtin_shufflevector(odd0, odd1, LINSTATE_EVENS);
    tap[2] = __builtin_shufflevector(even0, even1, LINSTATE_ODDS);
    tap[3] = __builtin_shufflevector(odd0, odd1, LINSTATE_ODDS);
}
#else
LINSTATE_INLINE void taps4(const float* p, F (&tap)[4]) {
    float part[4][W];
    for (int c = 0; c < W; ++c)
        for (int w = 0; w < 4; ++w) part[w][c] = p[4 * c + w];
    for (int w = 0; w < 4; ++w) tap[w] = load(part[w]);
}
#endif

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
    // Rows lie apart, and some of them in another core's cache: the processor guesses neither what is read nor what is written next.
    static LINSTATE_INLINE void ask_ahead(const ConvCall& call, Size batch, Size start, Size t, const ConvTask& task) {
        constexpr Size kAhead = 6;
        if (t + kAhead >= task.last) return;
        const Size at = start + t + kAhead, n = task.to - task.from;
        const Size width = call.x.dtype == Dtype::f32 ? 4 : 2, out_width = call.out.dtype == Dtype::f32 ? 4 : 2;
        const char* x = static_cast<const char*>(call.x.data) + (batch * call.x.batch + at * call.x.time + task.from) * width;
        const char* out =
            static_cast<const char*>(call.out.data) + (batch * call.out.batch + at * call.out.time + task.from) * out_width;
        for (Size byte = 0; byte < n * width; byte += 64) __builtin_prefetch(x + byte, 0, 3);
        for (Size byte = 0; byte < n * out_width; byte += 64) __builtin_prefetch(out + byte, 1, 3);
    }

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
        Size whole = 0;
        if (Taps == 4 && call.weight_dtype == Dtype::f32)
            for (; whole + W <= n; whole += W) {
                F tap[4];
                taps4(static_cast<const float*>(call.weight) + (task.from + whole) * 4, tap);
                for (Size w = 0; w < 4; ++w) store(weight + w * cp + whole, tap[w]);
            }
        for (Size c = whole; c < cp; ++c)
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
            ask_ahead(call, batch, start, t, task);
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
