// Denormal numbers are zero while a kernel runs.
#pragma once

#include <cstdint>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace linstate::LINSTATE_VARIANT {
namespace {

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

}  // namespace
}  // namespace linstate::LINSTATE_VARIANT
