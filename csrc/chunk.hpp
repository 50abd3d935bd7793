// What the chunked recurrences share: one chunk of tokens of one head, its decays and its triangular score matrices.
//
// A decay over tokens j+1 ... i is the product of the single decays D_s = exp(g_s) <= 1. Products of numbers <= 1 neither
// overflow nor cancel; where they underflow the answer is an exact zero. With 64 tokens their relative error is below
// 64 roundings, 4e-6. So exp is taken once for each gate, of a number <= 0, and never of a difference of sums.
//
// Gates per channel: D_{j+1} ... D_i sits inside the sum over channels, and cannot be split into a factor of i and one of j
// without a point of reference between them. Blocks of 16 tokens give it: for rows in block I and columns before it the
// reference is the block's begin. Rows carry the product from there to i, columns the product from j to there; when block
// I is done, the columns are moved on to its end, and after the last block they stand at the chunk's end, which is where
// the state update wants them. Inside a block the products are made pair by pair.
#pragma once

#include <utility>

#include "gemm.hpp"

namespace linstate::LINSTATE_VARIANT {

inline constexpr Size CHUNK = 64;
inline constexpr Size BLOCK = 16;

// Leading dimensions: whole vectors, and an odd number of 64-byte lines, so that columns do not fall on few cache sets.
LINSTATE_INLINE Size leading(Size n) {
    const Size lines = round_up(n, 16) / 16;
    return (lines % 2 ? lines : lines + 1) * 16;
}
inline constexpr Size LDC = 80;  // leading(CHUNK)

struct RowSet {
    float* x = nullptr;        // [n, ldk]: raw in, out: decayed from the chunk's begin
    bool before = false;       // row i stands before the decay of its own token
    bool diagonal = true;      // whether row i sees column i
};
struct ColumnSet {
    float* x = nullptr;        // [n, ldk] raw; used up
    float* end = nullptr;      // [K, LDC] out: transposed, decayed to the chunk's end, zeros behind column n
};

// memory handed out piece by piece
struct Arena {
    char* at;
    explicit Arena(void* p) : at(static_cast<char*>(p)) {}
    float* floats(Size n) {
        float* p = reinterpret_cast<float*>(at);
        at += round_up(n * 4, 64);
        return p;
    }
};

// n: whole vectors, here and below
LINSTATE_INLINE void zero(float* p, Size n) {
    for (Size i = 0; i < n; i += W) store(p + i, F{});
}
LINSTATE_INLINE void multiply(float* x, const float* y, Size n) {
    for (Size i = 0; i < n; i += W) store(x + i, load(x + i) * load(y + i));
}
LINSTATE_INLINE void multiply(float* x, float y, Size n) {
    const F f = all(y);
    for (Size i = 0; i < n; i += W) store(x + i, load(x + i) * f);
}
LINSTATE_INLINE float dot(const float* x, const float* y, Size n) {
    F s = F{};
    for (Size i = 0; i < n; i += W) s += load(x + i) * load(y + i);
    return sum(s);
}
// four columns at once: the sums of x . y_0 ... x . y_3
LINSTATE_INLINE void dots4(float* out, const float* x, const float* y, Size ldy, Size n) {
    F s0 = F{}, s1 = F{}, s2 = F{}, s3 = F{};
    for (Size i = 0; i < n; i += W) {
        const F xi = load(x + i);
        s0 += xi * load(y + i);
        s1 += xi * load(y + ldy + i);
        s2 += xi * load(y + 2 * ldy + i);
        s3 += xi * load(y + 3 * ldy + i);
    }
    out[0] = sum(s0), out[1] = sum(s1), out[2] = sum(s2), out[3] = sum(s3);
}

// One step of a transposition in registers: the blocks of `Half` lanes off the diagonal of two rows change places.
template <int Half, int... Lane>
LINSTATE_INLINE void exchange(F& a, F& b, std::integer_sequence<int, Lane...>) {
    const F first = __builtin_shufflevector(a, b, (Lane & Half ? Lane - Half + W : Lane)...);
    b = __builtin_shufflevector(a, b, (Lane & Half ? Lane + W : Lane + Half)...);
    a = first;
}
template <int Half>
LINSTATE_INLINE void transpose(F* row) {
    if constexpr (Half > 0) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i)
            if (!(i & Half)) exchange<Half>(row[i], row[i + Half], std::make_integer_sequence<int, W>());
        transpose<Half / 2>(row);
    }
}

// to [K, LDC] columns from `column` on <- x [n, ldk], and zeros behind them up to a whole vector
inline __attribute__((noinline)) void transpose(float* to, Size column, const float* x, Size ldk, Size n, Size k) {
    for (Size j = 0; j < n; j += W)
        for (Size c = 0; c < k; c += W) {
            F row[W];
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i) row[i] = j + i < n ? load(x + (j + i) * ldk + c) : F{};
            transpose<W / 2>(row);
            float* p = to + c * LDC + column + j;
            if (c + W <= k) {
#pragma GCC unroll 16
                for (int i = 0; i < W; ++i) store(p + i * LDC, row[i]);
            } else {
#pragma GCC unroll 16
                for (int i = 0; i < W; ++i)
                    if (c + i < k) store(p + i * LDC, row[i]);
            }
        }
}

// Scores of R row sets against C column sets, and all of them moved to where the state needs them.
template <class Core, int R, int C>
struct Chunk {
    Size n = 0, k = 0, kp = 0, ldk = 0;  // tokens, channels, channels in whole vectors
    Gate gate = Gate::none;
    RowSet rows[R];
    ColumnSet columns[C];
    float* scores[R][C] = {};  // [n, LDC] each, zeros where row i does not see column j
    float* decays = nullptr;   // in: exp(g), [n] (scalar) or [n, ldk] (channel)
    float* total = nullptr;    // out: [kp] decay of the whole chunk
    float* block = nullptr;    // room [BLOCK * C, ldk]
    float* line = nullptr;     // room [max(LDC, ldk)]

    // Room that place() takes from the arena, in bytes, beside rows.
    static std::size_t bytes(Size k) {
        const Size ldk = leading(k);
        const Size floats = (R + C) * CHUNK * ldk + C * k * LDC + R * C * CHUNK * LDC + CHUNK * ldk + (1 + C * BLOCK) * ldk +
                            (LDC > ldk ? LDC : ldk);
        return std::size_t(floats) * 4 + 64 * (4 + R + 2 * C + R * C);
    }
    void place(Arena& arena, Size channels) {
        k = channels, kp = round_up(k, W), ldk = leading(k);
        float* x = arena.floats(R * CHUNK * ldk);  // one after another: see begin()
        rows[0].x = x;
        for (ColumnSet& set : columns) set.x = arena.floats(CHUNK * ldk), set.end = arena.floats(k * LDC);
        for (auto& of_row : scores)
            for (float*& s : of_row) s = arena.floats(CHUNK * LDC);
        decays = arena.floats(CHUNK * ldk), total = arena.floats(ldk), block = arena.floats(C * BLOCK * ldk);
        line = arena.floats(LDC > ldk ? LDC : ldk);
    }
    // The row sets of a chunk of n tokens follow each other without a gap, so that one matmul reads the state for all.
    void begin(Size tokens) {
        n = tokens;
        for (int r = 1; r < R; ++r) rows[r].x = rows[0].x + r * n * ldk;
    }

    void run(Core& core) {
        if (gate == Gate::channel)
            by_blocks(core);
        else
            at_once(core, round_up(n, W));
    }

   private:
    void at_once(Core& core, Size np) {
        for (ColumnSet& set : columns) transpose(set.end, 0, set.x, ldk, n, k);
        for (int c = 0; c < C; ++c) {
            const typename Core::Right seen = core.keep(k, np, columns[c].end, LDC);
            for (int r = 0; r < R; ++r)
                if (scores[r][c])
                    core.gemm(n, np, k, rows[r].x, ldk, seen, scores[r][c], LDC, Start::zero, nullptr, Shape::lower_n);
        }
        // line[j]: the decay from j to the row; a row adds its own token's decay and begins column i with 1
        zero(line, LDC);
        float from_begin = 1.0f;
        for (Size i = 0; i < n; ++i) {
            const float d = gate == Gate::none ? 1.0f : decays[i];
            for (int r = 0; r < R; ++r)
                if (rows[r].before) finish_row(r, i, from_begin);
            if (gate != Gate::none) multiply(line, d, round_up(i, W));
            line[i] = 1.0f;
            from_begin *= d;
            for (int r = 0; r < R; ++r)
                if (!rows[r].before) finish_row(r, i, from_begin);
        }
        // now line[j] is the decay from j to the chunk's end
        if (gate != Gate::none)
            for (ColumnSet& set : columns)
                for (Size c = 0; c < k; ++c) multiply(set.end + c * LDC, line, np);
        for (Size c = 0; c < kp; c += W) store(total + c, all(from_begin));
    }
    void finish_row(int r, Size i, float from_begin) {
        for (int c = 0; c < C; ++c) {
            float* s = scores[r][c] ? scores[r][c] + i * LDC : nullptr;
            if (!s) continue;
            const Size seen = rows[r].diagonal && !rows[r].before ? i + 1 : i;
            const Size whole = round_up(seen, W);
            if (gate != Gate::none) multiply(s, line, whole);
            for (Size j = seen; j < whole; ++j) s[j] = 0.0f;
            zero(s + whole, LDC - whole);
        }
        if (gate != Gate::none) multiply(rows[r].x + i * ldk, from_begin, kp);
    }

    void by_blocks(Core& core) {
        for (auto& of_row : scores)
            for (float* s : of_row)
                if (s) zero(s, n * LDC);
        for (Size c = 0; c < kp; c += W) store(total + c, all(1.0f));  // the product of the blocks done
        for (Size begin = 0; begin < n; begin += BLOCK) {
            const Size size = n - begin < BLOCK ? n - begin : BLOCK;
            inside_block(begin, size);
            // line: the decay from the block's begin
            for (Size c = 0; c < kp; c += W) store(line + c, all(1.0f));
            for (Size i = begin; i < begin + size; ++i) {
                for (int r = 0; r < R; ++r)
                    if (rows[r].before) multiply(rows[r].x + i * ldk, line, kp);
                multiply(line, decays + i * ldk, kp);
                for (int r = 0; r < R; ++r)
                    if (!rows[r].before) multiply(rows[r].x + i * ldk, line, kp);
            }
            if (begin > 0) {
                for (int c = 0; c < C; ++c) {
                    const typename Core::Right seen = core.keep(k, begin, columns[c].end, LDC);
                    for (int r = 0; r < R; ++r)
                        if (scores[r][c])
                            core.gemm(size, begin, k, rows[r].x + begin * ldk, ldk, seen, scores[r][c] + begin * LDC,
                                      LDC, Start::zero);
                }
                for (ColumnSet& set : columns)
                    for (Size c = 0; c < k; ++c) multiply(set.end + c * LDC, line[c], begin);
                for (int r = 0; r < R; ++r)
                    for (Size i = begin; i < begin + size; ++i) multiply(rows[r].x + i * ldk, total, kp);
            }
            for (int c = 0; c < C; ++c)
                transpose(columns[c].end, begin, block + c * BLOCK * ldk, ldk, size, k);
            multiply(total, line, kp);
        }
    }
    // Pairs inside one block; leaves the columns, decayed to the block's end, in `block`.
    void inside_block(Size begin, Size size) {
        for (Size i = 0; i < size; ++i) {
            const float* d = decays + (begin + i) * ldk;
            for (int c = 0; c < C; ++c) {
                float* cols = block + c * BLOCK * ldk;
                for (int r = 0; r < R; ++r)
                    if (rows[r].before && scores[r][c]) pairs(r, c, begin, i, i);
                for (Size j = 0; j < i; ++j) multiply(cols + j * ldk, d, kp);
                const float* raw = columns[c].x + (begin + i) * ldk;
                for (Size p = 0; p < kp; p += W) store(cols + i * ldk + p, load(raw + p));
                for (int r = 0; r < R; ++r)
                    if (!rows[r].before && scores[r][c]) pairs(r, c, begin, i, rows[r].diagonal ? i + 1 : i);
            }
        }
    }
    void pairs(int r, int c, Size begin, Size i, Size seen) {
        const float* x = rows[r].x + (begin + i) * ldk;
        const float* cols = block + c * BLOCK * ldk;
        float* s = scores[r][c] + (begin + i) * LDC + begin;
        Size j = 0;
        for (; j + 4 <= seen; j += 4) dots4(s + j, x, cols + j * ldk, ldk, kp);
        for (; j < seen; ++j) s[j] = dot(x, cols + j * ldk, kp);
    }
};

}  // namespace linstate::LINSTATE_VARIANT
