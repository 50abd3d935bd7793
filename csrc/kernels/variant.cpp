// The kernels of one instruction set. Compiled once for each, with LINSTATE_VARIANT, LINSTATE_LANES and the compiler's
// options for it (CMakeLists.txt).
#include "attention.hpp"
#include "entry.hpp"
#include "matrix.hpp"
#include "token.hpp"

namespace linstate::LINSTATE_VARIANT {

const Kernels kernels = {
    LINSTATE_NAME,
    Set::LINSTATE_VARIANT,
    W,
    2 * W,
    kernel<LinearAttention<PlainCore>>(),
    kernel<DeltaRule<PlainCore>>(),
    kernel<Dplr<PlainCore>>(),
    kernel<LinearAttention<PlainCore>>(),
    kernel<DeltaRule<PlainCore>>(),
    kernel<Dplr<PlainCore>>(),
    &token_kernels,
    matmul_core<PlainCore>(),
    matmul_core<PlainCore>(),
    attention_kernel<PlainCore>(),
    attention_kernel<PlainCore>(),
};

}  // namespace linstate::LINSTATE_VARIANT
