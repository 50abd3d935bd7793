// A panel of a packed weight times rows of x: what linear.cpp is made of; the layout is told in linear.hpp.
//
// One row of x, a decoded token, is bound by reading the weight: codes become numbers in registers and are multiplied where
// they are. Several rows are bound by multiplying: the panel is made to bf16 pairs once (bf16 is that already), stays in the
// second-level cache, and all rows pass. Products of bf16, sums in float32, over k in rising order in one chain for each
// element: a row's result does not depend on its neighbours, nor on threads. For bf16 it is the same for one row and for
// many (but with AMX, which adds in its own order); codes are rounded with their scale to bf16 for many rows only.
#pragma once

#include "chunk.hpp"
#include "entry.hpp"
#include "linear.hpp"

#if defined(LINSTATE_DOTS) || defined(LINSTATE_TILES)
#include "tiles.hpp"
#endif

namespace linstate::LINSTATE_VARIANT {

// acc (+ bias) -> columns [from, from + PANEL) of row `row`, as far as there are such
inline void write_panel(const LinearCall& call, Size row, Size from, float* acc) {
    const Size count = call.n - from < PANEL ? call.n - from : PANEL;
    if (call.bias.data)
        for (Size j = 0; j < count; ++j) acc[j] += read_one(call.bias.data, call.bias.dtype, from + j);
    write_row(call.out.data, call.out.dtype, row * call.out.batch + from, acc, count);
}

// code j (of a word's two lowest) as float32, of the even k and of the odd
template <int Bits>
LINSTATE_INLINE F code(U word, int j, int half) {
    constexpr std::uint32_t mask = (1u << Bits) - 1;
    const I i = (I)((word >> (16 * half + Bits * j)) & mask);
    return __builtin_convertvector(i, F) - float(1 << (Bits - 1));
}

LINSTATE_INLINE U load_words(const std::uint32_t* p) {
    U x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
}

#if !defined(LINSTATE_DOTS) && !defined(LINSTATE_TILES)

// Without dot products of bf16: float32 throughout, on the matmul of gemm.hpp.
struct PlainPanel {
    static constexpr int N = PANEL / W;
    static constexpr Size ROWS = 2 * MR;

    static std::size_t scratch(const LinearCall& call) {
        const Size rows = call.rows > 1 ? ROWS : 1;
        return std::size_t(call.k * (call.rows > 1 ? PANEL : 0) + rows * (call.k + PANEL)) * 4 + 192;
    }

    template <int Bits>
    static void one_row(const LinearCall& call, const std::uint32_t* w, const std::uint16_t* scales, const float* x, float* out) {
        F acc[N] = {};
        constexpr int pairs = 16 / Bits;  // in a word
        for (Size p = 0; p < call.k; p += Bits == 16 ? 2 : GROUP) {
            if constexpr (Bits == 16) {
#pragma GCC unroll 8
                for (int j = 0; j < N; ++j) {
                    const U word = load_words(w + j * W);
                    acc[j] += bits(word << 16) * x[p];
                    acc[j] += bits(word & 0xffff0000u) * x[p + 1];
                }
                w += PANEL;
            } else {
                F part[N] = {};
                for (Size q = p; q < p + GROUP; q += 2 * pairs, w += PANEL)
#pragma GCC unroll 4
                    for (int i = 0; i < pairs; ++i)
#pragma GCC unroll 8
                        for (int j = 0; j < N; ++j) {
                            const U word = load_words(w + j * W);
                            part[j] += code<Bits>(word, i, 0) * x[q + 2 * i];
                            part[j] += code<Bits>(word, i, 1) * x[q + 2 * i + 1];
                        }
#pragma GCC unroll 8
                for (int j = 0; j < N; ++j) acc[j] += part[j] * load_bf16(scales + j * W);
                scales += PANEL;
            }
        }
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j) store(out + j * W, acc[j]);
    }

    template <int Bits>
    static void unpack(const LinearCall& call, const std::uint32_t* w, const std::uint16_t* scales, float* to) {
        constexpr int pairs = Bits == 16 ? 1 : 16 / Bits;
        for (Size p = 0; p < call.k; p += 2 * pairs, w += PANEL)
            for (int i = 0; i < pairs; ++i)
                for (int j = 0; j < N; ++j) {
                    const U word = load_words(w + j * W);
                    F even, odd;
                    if constexpr (Bits == 16) {
                        even = bits(word << 16), odd = bits(word & 0xffff0000u);
                    } else {  // rounded as the others do
                        const F scale = load_bf16(scales + p / GROUP * PANEL + j * W);
                        even = bits(bf16_bits(code<Bits>(word, i, 0) * scale) << 16);
                        odd = bits(bf16_bits(code<Bits>(word, i, 1) * scale) << 16);
                    }
                    store(to + (p + 2 * i) * PANEL + j * W, even);
                    store(to + (p + 2 * i + 1) * PANEL + j * W, odd);
                }
    }

    template <int Bits>
    static void run(const LinearCall& call, Size first, Size last, void* scratch) {
        Arena arena(scratch);
        float* x = arena.floats((call.rows > 1 ? ROWS : 1) * call.k);
        float* out = arena.floats((call.rows > 1 ? ROWS : 1) * PANEL);
        float* panel = call.rows > 1 ? arena.floats(call.k * PANEL) : nullptr;
        if (call.rows == 1) read_row(x, call.x, Dtype::bf16, 0, call.k, call.k, 1.0f);
        for (Size i = first; i < last; ++i) {
            const auto* w = static_cast<const std::uint32_t*>(call.weight) + i * panel_words(call.k, call.format);
            const std::uint16_t* scales = call.scales + (Bits == 16 ? 0 : i * (call.k / GROUP) * PANEL);
            if (call.rows == 1) {
                one_row<Bits>(call, w, scales, x, out);
                write_panel(call, 0, i * PANEL, out);
                continue;
            }
            unpack<Bits>(call, w, scales, panel);
            for (Size r = 0; r < call.rows; r += ROWS) {
                const Size rows = call.rows - r < ROWS ? call.rows - r : ROWS;
                for (Size s = 0; s < rows; ++s)
                    read_row(x + s * call.k, call.x, Dtype::bf16, (r + s) * call.x_stride, call.k, call.k, 1.0f);
                PlainCore::gemm(rows, PANEL, call.k, x, call.k, panel, PANEL, out, PANEL, Start::zero);
                for (Size s = 0; s < rows; ++s) write_panel(call, r + s, i * PANEL, out + s * PANEL);
            }
        }
    }
};

#else

// Numbers of 16 codes of each half of a word: bf16 pairs from the lowest four bits of both halves.
struct Table {
#if defined(__AVX512BF16__)
    U values;
    Table(float factor, float offset) {  // twice, as five bits are looked at
        std::uint16_t v[2 * W];
        for (int i = 0; i < 2 * W; ++i) v[i] = to_bf16(float(i % 16) * factor + offset);
        __builtin_memcpy(&values, v, sizeof values);
    }
    LINSTATE_INLINE U operator()(U codes) const {
        return (U)_mm512_permutexvar_epi16((__m512i)codes, (__m512i)values);
    }
    LINSTATE_INLINE static U shift(U word, int by) { return (U)_mm512_srli_epi16((__m512i)word, unsigned(by)); }
#else
    float factor, offset;
    Table(float f, float o) : factor(f), offset(o) {}
    LINSTATE_INLINE U operator()(U codes) const {
        const F low = __builtin_convertvector((I)(codes & 15), F) * factor + offset;
        const F high = __builtin_convertvector((I)((codes >> 16) & 15), F) * factor + offset;
        return (bits(low) >> 16) | (bits(high) & 0xffff0000u);
    }
    LINSTATE_INLINE static U shift(U word, int by) { return word >> by; }
#endif
};

// On the dot products of bf16; Engine (tiles.hpp) multiplies several rows.
template <class Engine>
struct PairPanel {
    static constexpr int N = PANEL / W;
    static constexpr Size ROWS = 2 * TILE;  // of the largest strip

    static std::size_t scratch(const LinearCall& call) {
        if (call.rows == 1) return PANEL * 4 + 64;
        const Size panel = call.format == Format::bf16 ? 0 : call.k / 2 * PANEL;
        return std::size_t(ROWS * PANEL + panel + ROWS * (call.k / 2)) * 4 + 192;
    }

    // Codes of 8 bits are two of 4, of which one counts sixteenfold: both are multiplied with the same x.
    template <int Bits>
    static void one_row(const LinearCall& call, const Pair* w, const std::uint16_t* scales, const Table& low, const Table& high,
                        float* out) {
        const Pair* x = reinterpret_cast<const Pair*>(call.x);
        F acc[N] = {};
        if constexpr (Bits == 16) {
            for (Size p = 0; p < call.k / 2; ++p, w += PANEL) {
                const U xp = U{} + x[p];
#pragma GCC unroll 2
                for (int j = 0; j < N; ++j) acc[j] = dot_pairs(acc[j], xp, load_pairs(w + j * W));
            }
        } else {
            constexpr int pairs = 16 / Bits;
            for (Size g = 0; g < call.k; g += GROUP, scales += PANEL) {
                F part[N][2] = {};  // two chains, as one waits for each sum
#pragma GCC unroll 8
                for (int u = 0; u < GROUP / (2 * pairs); ++u, w += PANEL, x += pairs) {
                    constexpr int second = Bits == 4 ? 1 : 0, third = Bits == 4 ? 2 : 1, fourth = Bits == 4 ? 3 : 1;
                    const Table& upper = Bits == 4 ? low : high;
#pragma GCC unroll 2
                    for (int j = 0; j < N; ++j) {
                        const U word = load_pairs(w + j * W);
                        part[j][0] = dot_pairs(part[j][0], U{} + x[0], low(word));
                        part[j][1] = dot_pairs(part[j][1], U{} + x[second], upper(Table::shift(word, 4)));
                        part[j][0] = dot_pairs(part[j][0], U{} + x[third], low(Table::shift(word, 8)));
                        part[j][1] = dot_pairs(part[j][1], U{} + x[fourth], upper(Table::shift(word, 12)));
                    }
                }
#pragma GCC unroll 2
                for (int j = 0; j < N; ++j) acc[j] += (part[j][0] + part[j][1]) * load_bf16(scales + j * W);
            }
        }
#pragma GCC unroll 2
        for (int j = 0; j < N; ++j) store(out + j * W, acc[j]);
    }

    template <int Bits>
    static void unpack(const LinearCall& call, const Pair* w, const std::uint16_t* scales, Pair* to) {
        constexpr int pairs = 16 / Bits;
        for (Size p = 0; p < call.k; p += 2 * pairs, w += PANEL)
            for (int j = 0; j < N; ++j) {
                const U word = load_pairs(w + j * W);
                const F scale = load_bf16(scales + p / GROUP * PANEL + j * W);
#pragma GCC unroll 4
                for (int i = 0; i < pairs; ++i)
                    store_interleaved(to + (p / 2 + i) * PANEL + j * W, code<Bits>(word, i, 0) * scale,
                                      code<Bits>(word, i, 1) * scale);
            }
    }

    template <int Bits>
    static void run(const LinearCall& call, Size first, Size last, void* scratch) {
        Arena arena(scratch);
        float* out = arena.floats(call.rows == 1 ? PANEL : ROWS * PANEL);
        if (call.rows == 1) {
            const Table low(1.0f, Bits == 4 ? -8.0f : 0.0f), high(16.0f, -128.0f);
            for (Size i = first; i < last; ++i) {
                one_row<Bits>(call, weight(call, i), scales(call, i), low, high, out);
                write_panel(call, 0, i * PANEL, out);
            }
            return;
        }
        Engine engine;
        Pair* edge = reinterpret_cast<Pair*>(arena.floats(ROWS * (call.k / 2)));
        Pair* panel = Bits == 16 ? nullptr : reinterpret_cast<Pair*>(arena.floats(call.k / 2 * PANEL));
        // The last rows, filled up to a strip with zeros.
        const Size whole = call.rows / engine.strip(ROWS) * engine.strip(ROWS), left = call.rows - whole;
        for (Size r = 0; r < left; ++r)
            __builtin_memcpy(edge + r * (call.k / 2), call.x + (whole + r) * call.x_stride, std::size_t(call.k) * 2);
        if (left > 0)
            __builtin_memset(edge + left * (call.k / 2), 0, std::size_t(round_up(left, engine.strip(left)) - left) * std::size_t(call.k) * 2);
        for (Size i = first; i < last; ++i) {
            const Pair* b = weight(call, i);
            if constexpr (Bits != 16) {
                unpack<Bits>(call, b, scales(call, i), panel);
                b = panel;
            }
            for (Size r = 0; r < call.rows;) {
                const bool inside = r < whole;
                const Size strip = engine.strip(inside ? ROWS : call.rows - r);
                const Pair* a = inside ? reinterpret_cast<const Pair*>(call.x + r * call.x_stride)
                                       : edge + (r - whole) * (call.k / 2);
                engine.block(strip, N, call.k / 2, a, inside ? call.x_stride / 2 : call.k / 2, b, PANEL, out, PANEL, false,
                             false);
                for (Size s = 0; s < strip && r + s < call.rows; ++s) write_panel(call, r + s, i * PANEL, out + s * PANEL);
                r += strip;
            }
        }
    }

   private:
    static const Pair* weight(const LinearCall& call, Size panel) {
        return static_cast<const Pair*>(call.weight) + panel * panel_words(call.k, call.format);
    }
    static const std::uint16_t* scales(const LinearCall& call, Size panel) {
        return call.scales + (call.scales ? panel * (call.k / GROUP) * PANEL : 0);
    }
};

#endif

template <class Panel>
void run_linear(const LinearCall& call, Size first, Size last, void* scratch) {
    const FlushDenormals flush;
    if (call.format == Format::bf16)
        Panel::template run<16>(call, first, last, scratch);
    else if (call.format == Format::int8)
        Panel::template run<8>(call, first, last, scratch);
    else
        Panel::template run<4>(call, first, last, scratch);
}

template <class Panel>
constexpr LinearKernels linear_kernels() {
    return {&run_linear<Panel>, &Panel::scratch};
}

}  // namespace linstate::LINSTATE_VARIANT
