// The kernels of one instruction set. Compiled once for each, with LINSTATE_VARIANT, LINSTATE_LANES and the compiler's
// options for it (CMakeLists.txt).
#include "matrix.hpp"

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

template <class Recurrence>
void run(const MatrixCall& call, const MatrixTask& task, void* scratch) {
    const FlushDenormals flush;
    Recurrence::run(call, task, scratch);
}

template <class Recurrence>
constexpr MatrixKernel kernel() {
    return {&run<Recurrence>, &Recurrence::scratch};
}

}  // namespace

const Kernels kernels = {
    LINSTATE_NAME,
    W,
    2 * W,
    kernel<LinearAttention<PlainCore>>(),
    kernel<DeltaRule<PlainCore>>(),
    kernel<Dplr<PlainCore>>(),
    kernel<LinearAttention<PlainCore>>(),
    kernel<DeltaRule<PlainCore>>(),
    kernel<Dplr<PlainCore>>(),
};

}  // namespace linstate::LINSTATE_VARIANT
