// The matmul core for bf16 inputs: float32 operands rounded to bf16 as they are packed, products summed in float32.
//
// C [m, n] = start + A [m, k] B [k, n] as in gemm.hpp. Both operands are packed in pairs of consecutive k, 32 bits each, the
// lower k in the lower half: A row by row, B in rows of pairs (row p / 2 holds (b[p][j], b[p + 1][j]) for every column j,
// "VNNI"). k is filled with zeros to a multiple of 32, one tile. A is packed one strip of rows at a time, just before use;
// B as a whole, once for all matmuls that share it (keep, solve). Two engines multiply what was packed:
//   TileEngine: tiles of 16 rows of 64 bytes and their product (AMX), blocks of 2 x 2 or 1 x 4 tiles of C;
//   DotEngine: vectors of 16 pairs and their dot product (AVX512-BF16), blocks of 8 rows and up to 3 vectors of C.
// Both exist on the processor's instructions, where the compiler's options have them, and otherwise in plain code that does
// what Intel's manual says of these instructions, so that packing, edges, triangles and the configuration of the tiles are
// tested on any machine.
//
// Every element of C sums its k in the same order wherever its column stands: results do not depend on how columns are
// shared out to threads. Derivation, counts and errors: docs/kernels-tiles.md.
#pragma once

#include "chunk.hpp"

#if defined(__AVX512BF16__) || defined(__AMX_BF16__)
#include <immintrin.h>
#endif

namespace linstate::LINSTATE_VARIANT {

static_assert(W == 16, "one vector is a row of a tile");

using Pair = std::uint32_t;

inline constexpr Size TILE = 16;      // rows of a tile; columns of a tile of C
inline constexpr Size STEP = 2 * W;   // k of one product of tiles
inline constexpr Size STEP_PAIRS = W;

LINSTATE_INLINE U load_pairs(const Pair* p) {
    U x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
}
LINSTATE_INLINE void store_pairs(Pair* p, U x) { __builtin_memcpy(p, &x, sizeof x); }

// 32 consecutive numbers: 16 pairs in their order.
LINSTATE_INLINE void store_adjacent(Pair* to, F first, F second) {
#if defined(__AVX512BF16__)
    store_pairs(to, (U)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
#else
    std::uint16_t halves[2 * W];
    store_bf16(halves, first);
    store_bf16(halves + W, second);
    __builtin_memcpy(to, halves, sizeof halves);
#endif
}
// The same column of two rows: a pair for each of 16 columns.
LINSTATE_INLINE void store_interleaved(Pair* to, F low, F high) {
#if defined(__AVX512BF16__)
    const U halves = (U)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);  // 16 of low, then 16 of high
    const U order = {0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007,
                     0x180008, 0x190009, 0x1a000a, 0x1b000b, 0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f};
    store_pairs(to, (U)_mm512_permutexvar_epi16((__m512i)order, (__m512i)halves));
#else
    store_pairs(to, bf16_bits(low) | bf16_bits(high) << 16);
#endif
}
// The first n numbers, n of any sign, and zeros.
LINSTATE_INLINE F load_some(const float* p, Size n) { return n >= W ? load(p) : n > 0 ? load_part(p, n) : F{}; }

LINSTATE_INLINE F dot_pairs(F sum, U a, U b) {
#if defined(__AVX512BF16__)
    return (F)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else  // the upper product first
    sum += bits(a & 0xffff0000) * bits(b & 0xffff0000);
    return sum + bits(a << 16) * bits(b << 16);
#endif
}

// What LDTILECFG reads: 8 tiles of 16 rows of 64 bytes.
struct alignas(64) TileConfig {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[8] = {64, 64, 64, 64, 64, 64, 64, 64}, no_row_bytes[8] = {};
    std::uint8_t rows[8] = {16, 16, 16, 16, 16, 16, 16, 16}, no_rows[8] = {};
};
static_assert(sizeof(TileConfig) == 64);
inline constexpr TileConfig TILE_CONFIG;

// The tile registers of this thread, from configuration to release. Tiles 0 to 3 hold C, 4 and 5 A, 6 and 7 B.
#if defined(__AMX_BF16__)

class Tiles {
   public:
    Tiles() { _tile_loadconfig(&TILE_CONFIG); }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

    // The compiler's tile functions want literal numbers, and do not tell it that they read memory: whoever loads what
    // was just written calls this in between.
    LINSTATE_INLINE static void written() { __asm__ volatile("" ::: "memory"); }

#define LINSTATE_IF_TILE(t, use) \
    if constexpr (T == t) use
    template <int T>
    LINSTATE_INLINE void clear() {
        LINSTATE_IF_TILE(0, _tile_zero(0));
        LINSTATE_IF_TILE(1, _tile_zero(1));
        LINSTATE_IF_TILE(2, _tile_zero(2));
        LINSTATE_IF_TILE(3, _tile_zero(3));
    }
    template <int T>
    LINSTATE_INLINE void load(const void* p, Size stride) {
        LINSTATE_IF_TILE(0, _tile_loadd(0, p, stride));
        LINSTATE_IF_TILE(1, _tile_loadd(1, p, stride));
        LINSTATE_IF_TILE(2, _tile_loadd(2, p, stride));
        LINSTATE_IF_TILE(3, _tile_loadd(3, p, stride));
        LINSTATE_IF_TILE(4, _tile_loadd(4, p, stride));
        LINSTATE_IF_TILE(5, _tile_loadd(5, p, stride));
        LINSTATE_IF_TILE(6, _tile_loadd(6, p, stride));
        LINSTATE_IF_TILE(7, _tile_loadd(7, p, stride));
    }
    template <int T>
    LINSTATE_INLINE void save(void* p, Size stride) {
        LINSTATE_IF_TILE(0, _tile_stored(0, p, stride));
        LINSTATE_IF_TILE(1, _tile_stored(1, p, stride));
        LINSTATE_IF_TILE(2, _tile_stored(2, p, stride));
        LINSTATE_IF_TILE(3, _tile_stored(3, p, stride));
    }
    template <int C, int A, int B>  // every product that a block has
    LINSTATE_INLINE void dot() {
        constexpr int T = C * 100 + A * 10 + B;
        LINSTATE_IF_TILE(46, _tile_dpbf16ps(0, 4, 6));
        LINSTATE_IF_TILE(147, _tile_dpbf16ps(1, 4, 7));
        LINSTATE_IF_TILE(246, _tile_dpbf16ps(2, 4, 6));
        LINSTATE_IF_TILE(347, _tile_dpbf16ps(3, 4, 7));
        LINSTATE_IF_TILE(256, _tile_dpbf16ps(2, 5, 6));
        LINSTATE_IF_TILE(357, _tile_dpbf16ps(3, 5, 7));
        static_assert(T == 46 || T == 147 || T == 246 || T == 347 || T == 256 || T == 357);
    }
#undef LINSTATE_IF_TILE
};

#else

// The same in plain code, after Intel's manual (SDM vol. 1, 18; vol. 2: LDTILECFG, TILELOADD, TILESTORED, TDPBF16PS). What
// would be an exception there ends the program here. In which order TDPBF16PS adds is told differently in different places,
// and nothing here depends on it: this is one of them, and a processor's sums may differ in their last bits.
class Tiles {
    struct Tile {
        int rows = 0, row_bytes = 0;
        alignas(64) unsigned char data[16][64] = {};
    };
    Tile tiles_[8];

    static void demand(bool held) {
        if (!held) __builtin_trap();
    }

   public:
    Tiles() {
        unsigned char config[64];
        __builtin_memcpy(config, &TILE_CONFIG, 64);
        demand(config[0] == 1 && config[1] == 0);
        for (int i = 2; i < 16; ++i) demand(config[i] == 0);
        for (int i = 0; i < 16; ++i) {
            const int row_bytes = config[16 + 2 * i] + 256 * config[17 + 2 * i], rows = config[48 + i];
            demand(rows <= 16 && row_bytes <= 64 && row_bytes % 4 == 0 && (i < 8 || rows + row_bytes == 0));
            if (i < 8) tiles_[i].rows = rows, tiles_[i].row_bytes = row_bytes;
        }
    }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

    static void written() {}

    template <int T>
    void clear() {
        demand(tiles_[T].rows > 0);
        __builtin_memset(tiles_[T].data, 0, sizeof tiles_[T].data);
    }
    template <int T>
    void load(const void* p, Size stride) {
        clear<T>();
        for (int r = 0; r < tiles_[T].rows; ++r)
            __builtin_memcpy(tiles_[T].data[r], static_cast<const char*>(p) + r * stride, std::size_t(tiles_[T].row_bytes));
    }
    template <int T>
    void save(void* p, Size stride) {
        demand(tiles_[T].rows > 0);
        for (int r = 0; r < tiles_[T].rows; ++r)
            __builtin_memcpy(static_cast<char*>(p) + r * stride, tiles_[T].data[r], std::size_t(tiles_[T].row_bytes));
    }
    template <int C, int A, int B>
    void dot() {
        Tile &c = tiles_[C], &a = tiles_[A], &b = tiles_[B];
        demand(C != A && C != B && A != B);
        demand(c.rows == a.rows && a.row_bytes == 4 * b.rows && b.row_bytes == c.row_bytes && c.rows > 0);
        for (int r = 0; r < c.rows; ++r) {
            F low = F{}, high = F{};
            for (int p = 0; p < b.rows; ++p) {
                Pair pair;
                __builtin_memcpy(&pair, a.data[r] + 4 * p, 4);
                const U bp = load_pairs(reinterpret_cast<const Pair*>(b.data[p]));
                const U ap = U{} + pair;
                low += bits(ap << 16) * bits(bp << 16);
                high += bits(ap & 0xffff0000) * bits(bp & 0xffff0000);
            }
            float* row = reinterpret_cast<float*>(c.data[r]);
            linstate::LINSTATE_VARIANT::store(row, linstate::LINSTATE_VARIANT::load(row) + (low + high));
        }
    }
};

#endif

// A block is `strip` rows (padded with zeros in A) by some whole vectors; `corner`: its upper right tile is not wanted.
struct TileEngine {
    Tiles tiles;

    static Size strip(Size rows) { return rows > TILE ? 2 * TILE : TILE; }
    static Size columns(Size strip) { return strip > TILE ? 2 * TILE : 4 * TILE; }
    static bool corner(Size row, Size column) { return row == column; }

    void block(Size strip, Size vectors, Size pairs, const Pair* a, Size lda, const Pair* b, Size ldb, float* c, Size ldc,
               bool keep, bool corner) {
        if (strip > TILE && vectors == 2)
            corner ? product<2, 2, true>(pairs, a, lda, b, ldb, c, ldc, keep)
                   : product<2, 2, false>(pairs, a, lda, b, ldb, c, ldc, keep);
        else if (strip > TILE)
            product<2, 1, false>(pairs, a, lda, b, ldb, c, ldc, keep);
        else if (vectors == 4)
            product<1, 4, false>(pairs, a, lda, b, ldb, c, ldc, keep);
        else if (vectors == 3)
            product<1, 3, false>(pairs, a, lda, b, ldb, c, ldc, keep);
        else if (vectors == 2)
            product<1, 2, false>(pairs, a, lda, b, ldb, c, ldc, keep);
        else
            product<1, 1, false>(pairs, a, lda, b, ldb, c, ldc, keep);
    }

   private:
    template <int T>
    LINSTATE_INLINE void begin(const float* c, Size ldc, bool keep) {
        if (keep)
            tiles.load<T>(c, ldc * 4);
        else
            tiles.clear<T>();
    }
    // M x N tiles of C. The two tiles of B take turns, so that the next one is read while this one multiplies.
    template <int M, int N, bool Corner>
    inline __attribute__((noinline)) void product(Size pairs, const Pair* a, Size lda, const Pair* b, Size ldb, float* c,
                                                  Size ldc, bool keep) {
        Tiles::written();
        begin<0>(c, ldc, keep);
        if constexpr (N > 1 && !Corner) begin<1>(c + TILE, ldc, keep);
        if constexpr (N > 2) begin<2>(c + 2 * TILE, ldc, keep);
        if constexpr (N > 3) begin<3>(c + 3 * TILE, ldc, keep);
        if constexpr (M > 1) begin<2>(c + TILE * ldc, ldc, keep);
        if constexpr (M > 1 && N > 1) begin<3>(c + TILE * ldc + TILE, ldc, keep);
        for (Size p = 0; p < pairs; p += STEP_PAIRS, a += STEP_PAIRS, b += STEP_PAIRS * ldb) {
            tiles.load<4>(a, lda * 4);
            tiles.load<6>(b, ldb * 4);
            tiles.dot<0, 4, 6>();
            if constexpr (N > 1) tiles.load<7>(b + TILE, ldb * 4);
            if constexpr (N > 1 && !Corner) tiles.dot<1, 4, 7>();
            if constexpr (N > 2) tiles.load<6>(b + 2 * TILE, ldb * 4), tiles.dot<2, 4, 6>();
            if constexpr (N > 3) tiles.load<7>(b + 3 * TILE, ldb * 4), tiles.dot<3, 4, 7>();
            if constexpr (M > 1) tiles.load<5>(a + TILE * lda, lda * 4), tiles.dot<2, 5, 6>();
            if constexpr (M > 1 && N > 1) tiles.dot<3, 5, 7>();
        }
        tiles.save<0>(c, ldc * 4);
        if constexpr (N > 1 && !Corner) tiles.save<1>(c + TILE, ldc * 4);
        if constexpr (N > 2) tiles.save<2>(c + 2 * TILE, ldc * 4);
        if constexpr (N > 3) tiles.save<3>(c + 3 * TILE, ldc * 4);
        if constexpr (M > 1) tiles.save<2>(c + TILE * ldc, ldc * 4);
        if constexpr (M > 1 && N > 1) tiles.save<3>(c + TILE * ldc + TILE, ldc * 4);
    }
};

struct DotEngine {
    static constexpr int ROWS = 8;  // 24 sums, 3 vectors of B and a broadcast: 28 of 32 registers

    static Size strip(Size) { return ROWS; }
    static Size columns(Size) { return 3 * W; }
    static bool corner(Size, Size) { return false; }

    static void block(Size, Size vectors, Size pairs, const Pair* a, Size lda, const Pair* b, Size ldb, float* c, Size ldc,
                      bool keep, bool) {
        if (vectors == 3)
            product<3>(pairs, a, lda, b, ldb, c, ldc, keep);
        else if (vectors == 2)
            product<2>(pairs, a, lda, b, ldb, c, ldc, keep);
        else
            product<1>(pairs, a, lda, b, ldb, c, ldc, keep);
    }

   private:
    template <int N>
    inline __attribute__((noinline)) static void product(Size pairs, const Pair* a, Size lda, const Pair* b, Size ldb,
                                                         float* c, Size ldc, bool keep) {
        F sum[ROWS][N];
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 3
            for (int j = 0; j < N; ++j) sum[i][j] = keep ? load(c + i * ldc + j * W) : F{};
        for (Size p = 0; p < pairs; ++p) {
            U bp[N];
#pragma GCC unroll 3
            for (int j = 0; j < N; ++j) bp[j] = load_pairs(b + p * ldb + j * W);
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; ++i) {
                const U ap = U{} + a[i * lda + p];
#pragma GCC unroll 3
                for (int j = 0; j < N; ++j) sum[i][j] = dot_pairs(sum[i][j], ap, bp[j]);
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 3
            for (int j = 0; j < N; ++j) store(c + i * ldc + j * W, sum[i][j]);
    }
};

template <class Engine>
class TileCore {
    Engine engine_;
    Pair *left_, *right_, *kept_, *solved_;
    Size left_ld_, right_ld_;
    float *edge_, *corner_;

    static constexpr Size LEFT_ROWS = 2 * TILE;
    static constexpr Size EDGE = 4 * TILE * TILE;  // the largest block
    static Size depth(Size k) { return round_up(k > CHUNK ? k : CHUNK, STEP) / 2; }
    static Size left_leading(Size k) { return leading(depth(k)); }
    static Size right_leading(Size v) { return leading(v > CHUNK ? v : CHUNK); }

   public:
    struct Right {
        const Pair* b;
        Size ldb;
    };

    // Room for matmuls with k and n up to max(k, CHUNK) and max(v, CHUNK), in bytes.
    static std::size_t scratch(Size k, Size v) {
        return std::size_t(LEFT_ROWS * left_leading(k) + 3 * depth(k) * right_leading(v) + EDGE + TILE * TILE) * 4 + 64;
    }
    TileCore(void* memory, Size k, Size v) : left_ld_(left_leading(k)), right_ld_(right_leading(v)) {
        Pair* at = reinterpret_cast<Pair*>((reinterpret_cast<std::uintptr_t>(memory) + 63) / 64 * 64);
        left_ = at, at += LEFT_ROWS * left_ld_;
        right_ = at, at += depth(k) * right_ld_;
        kept_ = at, at += depth(k) * right_ld_;
        solved_ = at, at += depth(k) * right_ld_;
        edge_ = reinterpret_cast<float*>(at), corner_ = edge_ + EDGE;
    }

    Right keep(Size k, Size n, const float* b, Size ldb) {
        pack_right(kept_, k, n, b, ldb, round_up(k, STEP) / 2);
        return {kept_, right_ld_};
    }

    void gemm(Size m, Size n, Size k, const float* a, Size lda, const float* b, Size ldb, float* c, Size ldc, Start start,
              const float* row_scale = nullptr, Shape shape = Shape::full) {
        pack_right(right_, k, n, b, ldb, round_up(k, STEP) / 2);
        gemm(m, n, k, a, lda, Right{right_, right_ld_}, c, ldc, start, row_scale, shape);
    }
    void gemm(Size m, Size n, Size k, const float* a, Size lda, Right b, float* c, Size ldc, Start start,
              const float* row_scale = nullptr, Shape shape = Shape::full) {
        for (Size i = 0, strip; i < m; i += strip) {
            strip = Engine::strip(m - i);
            const Size rows = m - i < strip ? m - i : strip;
            const Size seen = shape == Shape::lower_k && i + rows < k ? i + rows : k;
            const Size width = shape == Shape::lower_n && i + rows < n ? round_up(i + rows, W) : n;
            pack_left(strip, rows, seen, a + i * lda, lda);
            if (start == Start::scaled)
                for (Size r = 0; r < rows; ++r) multiply(c + (i + r) * ldc, row_scale[i + r], width);
            for (Size j = 0, columns; j < width; j += columns) {
                columns = width - j < Engine::columns(strip) ? width - j : Engine::columns(strip);
                const bool corner = shape == Shape::lower_n && Engine::corner(i, j);
                float* at = c + i * ldc + j;
                const bool inside = rows == strip;  // otherwise by way of a buffer that has all rows
                if (!inside && start != Start::zero) copy(edge_, columns, at, ldc, rows, columns);
                engine_.block(strip, columns / W, round_up(seen, STEP) / 2, left_, left_ld_, b.b + j, b.ldb,
                              inside ? at : edge_, inside ? ldc : columns, start != Start::zero, corner);
                if (!inside) copy(at, ldc, edge_, columns, rows, columns);
            }
        }
    }

    // As PlainCore's: what stands left of a block of 16 rows by gemm, the triangle on the diagonal in float32. The solution
    // is packed block by block, and its packed form is what remains.
    Right solve(Size m, Size n, const float* l, Size ldl, float* x, Size ldx) {
        const Right solved{solved_, right_ld_};
        for (Size i = 0; i < m; i += TILE) {
            const Size rows = m - i < TILE ? m - i : TILE;
            float* block = x + i * ldx;
            if (i > 0) gemm(rows, n, i, l + i * ldl, ldl, solved, block, ldx, Start::keep);
            if (rows == TILE)
                triangle(n, l + i * ldl + i, ldl, block, ldx);
            else
                for (Size r = 1; r < rows; ++r)
                    for (Size p = 0; p < r; ++p) add(block + r * ldx, l[(i + r) * ldl + i + p], block + p * ldx, n);
            // k is filled to whole steps: the block after this one is zeros until it is solved
            pack_right(solved_ + i / 2 * right_ld_, rows, n, block, ldx, i % STEP ? TILE / 2 : STEP / 2);
        }
        return solved;
    }

   private:
    void pack_left(Size strip, Size rows, Size k, const float* a, Size lda) {
        for (Size r = 0; r < rows; ++r) {
            const float* from = a + r * lda;
            Pair* to = left_ + r * left_ld_;
            Size p = 0;
            for (; p + STEP <= k; p += STEP) store_adjacent(to + p / 2, load(from + p), load(from + p + W));
            if (p < k) store_adjacent(to + p / 2, load_some(from + p, k - p), load_some(from + p + W, k - p - W));
        }
        for (Size r = rows; r < strip; ++r)
            for (Size p = 0; p < k; p += STEP) store_pairs(left_ + r * left_ld_ + p / 2, U{});
    }
    void pack_right(Pair* to, Size k, Size n, const float* b, Size ldb, Size filled) {
        const Size ld = right_ld_;
        Size p = 0;
        for (; p + 2 <= k; p += 2, b += 2 * ldb, to += ld)
            for (Size j = 0; j < n; j += W) store_interleaved(to + j, load(b + j), load(b + ldb + j));
        if (p < k) {
            for (Size j = 0; j < n; j += W) store_interleaved(to + j, load(b + j), F{});
            to += ld;
        }
        for (Size row = (k + 1) / 2; row < filled; ++row, to += ld)
            for (Size j = 0; j < n; j += W) store_pairs(to + j, U{});
    }
    static void copy(float* to, Size ldt, const float* from, Size ldf, Size rows, Size columns) {
        for (Size r = 0; r < rows; ++r)
            for (Size j = 0; j < columns; j += W) store(to + r * ldt + j, load(from + r * ldf + j));
    }
    static void add(float* to, float factor, const float* from, Size n) {
        for (Size j = 0; j < n; j += W) store(to + j, load(to + j) + load(from + j) * factor);
    }
    // A whole block on the diagonal: 16 rows of one vector in registers, each row taken off all below it when it is done.
    void triangle(Size n, const float* l, Size ldl, float* x, Size ldx) {
        copy(corner_, TILE, l, ldl, TILE, TILE);
        for (Size j = 0; j < n; j += W) {
            F row[TILE];
#pragma GCC unroll 16
            for (int i = 0; i < TILE; ++i) row[i] = load(x + i * ldx + j);
#pragma GCC unroll 16
            for (int p = 0; p < TILE - 1; ++p)
#pragma GCC unroll 16
                for (int i = p + 1; i < TILE; ++i) row[i] += row[p] * corner_[i * TILE + p];
#pragma GCC unroll 16
            for (int i = 1; i < TILE; ++i) store(x + i * ldx + j, row[i]);
        }
    }
};

}  // namespace linstate::LINSTATE_VARIANT
