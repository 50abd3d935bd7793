// The matmul that every recurrence here is written on: C [m, n] = start + A [m, k] B [k, n], all row-major float32 in memory.
//
// n is padded by the caller to whole vectors. The micro-kernel keeps MR rows of two vectors in registers; for every k it
// loads two vectors of B and broadcasts MR elements of A. A panel of B (k rows of two vectors) stays in the first-level
// cache while all rows pass. Each element of C is one chain of fused multiply-adds over k in rising order, whatever the
// position of its row and column: results do not depend on how columns are shared out to threads.
#pragma once

#include "vec.hpp"

namespace linstate::LINSTATE_VARIANT {

enum class Start { zero, keep, scaled };  // C is set, added to, or multiplied row by row and added to
enum class Shape {
    full,
    lower_k,  // A is lower triangular (zeros above): row i needs k <= i only
    lower_n   // only C on and below the diagonal is wanted
};

#if LINSTATE_LANES == 16 || defined(__aarch64__)
inline constexpr int MR = 12;  // 32 registers
#else
inline constexpr int MR = 6;  // 16 registers
#endif

template <int M, int N, bool Solve>
LINSTATE_INLINE void micro(Size k, const float* a, Size lda, const float* b, Size ldb, float* c, Size ldc, Start start,
                           const float* row_scale) {
    F acc[M][N];
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < N; ++j) {
            if (start == Start::zero)
                acc[i][j] = F{};
            else if (start == Start::keep)
                acc[i][j] = load(c + i * ldc + j * W);
            else
                acc[i][j] = load(c + i * ldc + j * W) * row_scale[i];
        }
    for (Size p = 0; p < k; ++p) {
        F bp[N];
#pragma GCC unroll 2
        for (int j = 0; j < N; ++j) bp[j] = load(b + p * ldb + j * W);
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
            const F ai = all(a[i * lda + p]);
#pragma GCC unroll 2
            for (int j = 0; j < N; ++j) acc[i][j] += ai * bp[j];
        }
    }
    if constexpr (Solve) {  // the block on the diagonal: row i still lacks rows k to k + i - 1 of the solution
#pragma GCC unroll 16
        for (int i = 1; i < M; ++i)
#pragma GCC unroll 16
            for (int p = 0; p < i; ++p) {
                const F ai = all(a[i * lda + k + p]);
#pragma GCC unroll 2
                for (int j = 0; j < N; ++j) acc[i][j] += ai * acc[p][j];
            }
    }
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < N; ++j) store(c + i * ldc + j * W, acc[i][j]);
}

template <int M, int N, bool Solve>
inline __attribute__((noinline)) void block(Size k, const float* a, Size lda, const float* b, Size ldb, float* c, Size ldc,
                                            Start start, const float* row_scale) {
    // One copy for each start: the test is not made for every element.
    if (start == Start::zero)
        micro<M, N, Solve>(k, a, lda, b, ldb, c, ldc, Start::zero, nullptr);
    else if (start == Start::keep)
        micro<M, N, Solve>(k, a, lda, b, ldb, c, ldc, Start::keep, nullptr);
    else
        micro<M, N, Solve>(k, a, lda, b, ldb, c, ldc, Start::scaled, row_scale);
}

template <int M, bool Solve>
inline void rows_left(Size m, int vectors, Size k, const float* a, Size lda, const float* b, Size ldb, float* c, Size ldc,
                      Start start, const float* row_scale) {
    if constexpr (M > 0) {
        if (m == M) {
            if (vectors == 2)
                block<M, 2, Solve>(k, a, lda, b, ldb, c, ldc, start, row_scale);
            else
                block<M, 1, Solve>(k, a, lda, b, ldb, c, ldc, start, row_scale);
        } else {
            rows_left<M - 1, Solve>(m, vectors, k, a, lda, b, ldb, c, ldc, start, row_scale);
        }
    }
}

// float32 throughout.
//
// Every core has these members. `Right` is a right operand in the form that the core multiplies with: one that several
// matmuls share is prepared once, by `keep` or as what `solve` leaves; it serves until the next call of the same.
struct PlainCore {
    struct Right {
        const float* b;
        Size ldb;
    };

    static std::size_t scratch(Size, Size) { return 0; }
    PlainCore(void*, Size, Size) {}

    static Right keep(Size, Size, const float* b, Size ldb) { return {b, ldb}; }

    static void gemm(Size m, Size n, Size k, const float* a, Size lda, const float* b, Size ldb, float* c, Size ldc,
                     Start start, const float* row_scale = nullptr, Shape shape = Shape::full) {
        for (Size j = 0; j < n; j += 2 * W) {
            const int vectors = n - j > W ? 2 : 1;
            for (Size i = 0; i < m; i += MR) {
                const Size rows = m - i < MR ? m - i : MR;
                if (shape == Shape::lower_n && j > i + rows - 1) continue;
                const Size depth = shape == Shape::lower_k && i + rows < k ? i + rows : k;
                rows_left<MR, false>(rows, vectors, depth, a + i * lda, lda, b + j, ldb, c + i * ldc + j, ldc, start,
                                     row_scale ? row_scale + i : nullptr);
            }
        }
    }

    static void gemm(Size m, Size n, Size k, const float* a, Size lda, Right b, float* c, Size ldc, Start start,
                     const float* row_scale = nullptr, Shape shape = Shape::full) {
        gemm(m, n, k, a, lda, b.b, b.ldb, c, ldc, start, row_scale, shape);
    }

    // X <- (I - L)^-1 X for a strictly lower L [m, m]: row i is X_i + sum_{j < i} L_ij X_j with the new X_j.
    static Right solve(Size m, Size n, const float* l, Size ldl, float* x, Size ldx) {
        for (Size j = 0; j < n; j += 2 * W) {
            const int vectors = n - j > W ? 2 : 1;
            for (Size i = 0; i < m; i += MR) {
                const Size rows = m - i < MR ? m - i : MR;
                rows_left<MR, true>(rows, vectors, i, l + i * ldl, ldl, x + j, ldx, x + i * ldx + j, ldx, Start::keep,
                                    nullptr);
            }
        }
        return {x, ldx};
    }
};

}  // namespace linstate::LINSTATE_VARIANT
