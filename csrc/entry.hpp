// The way into a kernel from outside: what every entry of a table does before and after.
#pragma once

#include "gemm.hpp"

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace linstate::LINSTATE_VARIANT {

// Decays underflow as a matter of course, and arithmetic on denormal numbers is a hundred times slower: they are taken as
// zero while a kernel runs, and the thread's own setting is put back afterwards.
class FlushDenormals {
#if defined(__SSE__)
    unsigned before_ = _mm_getcsr();

   public:
    FlushDenormals() { _mm_setcsr(before_ | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(before_); }
#elif defined(__aarch64__)
    std::uint64_t before_;

   public:
    FlushDenormals() {
        __asm__ volatile("mrs %0, fpcr" : "=r"(before_));
        __asm__ volatile("msr fpcr, %0" : : "r"(before_ | (1u << 24)));
    }
    ~FlushDenormals() { __asm__ volatile("msr fpcr, %0" : : "r"(before_)); }
#endif
};

template <class Recurrence>
void run(const MatrixCall& call, const MatrixTask& task, void* scratch) {
    const FlushDenormals flush;
    Recurrence::run(call, task, scratch);
}

template <class Recurrence>
constexpr MatrixKernel kernel() {
    return {&run<Recurrence>, &Recurrence::scratch};
}

// A matmul core by itself, for the tests of it.
template <class Core>
void run_gemm(const GemmCall& c, void* scratch) {
    const FlushDenormals flush;
    Core core(scratch, c.room, c.room);
    const Start start = c.row_scale ? Start::scaled : c.keep ? Start::keep : Start::zero;
    core.gemm(c.m, c.n, c.k, c.a, c.lda, c.b, c.ldb, c.c, c.ldc, start, c.row_scale, static_cast<Shape>(c.shape));
}
template <class Core>
void run_solve(const GemmCall& c, void* scratch) {
    const FlushDenormals flush;
    Core core(scratch, c.room, c.room);
    core.solve(c.m, c.n, c.a, c.lda, c.c, c.ldc);
}
template <class Core>
constexpr MatmulCore matmul_core() {
    return {&run_gemm<Core>, &run_solve<Core>, &Core::scratch};
}

}  // namespace linstate::LINSTATE_VARIANT
