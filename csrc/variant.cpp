// The kernels of one instruction set. Compiled once for each, with LINSTATE_VARIANT, LINSTATE_LANES and the compiler's
// options for it (CMakeLists.txt).
#include "denormals.hpp"
#include "matrix.hpp"
#include "token.hpp"

namespace linstate::LINSTATE_VARIANT {
namespace {

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
    &token_kernels,
};

}  // namespace linstate::LINSTATE_VARIANT
