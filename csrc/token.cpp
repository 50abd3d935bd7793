// The kernels of one instruction set that walk token by token; see variant.cpp.
#include "token.hpp"

#include "conv.hpp"
#include "denormals.hpp"
#include "scan.hpp"
#include "step.hpp"

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

void convolve(const ConvCall& call, const ConvTask& task, void* scratch) {
    const FlushDenormals flush;
    ShortConvolution::run(call, task, scratch);
}

}  // namespace

const TokenKernels token_kernels = {
    kernel<SelectiveScan>(),
    kernel<Step<Kind::linear_attention>>(),
    kernel<Step<Kind::delta_rule>>(),
    kernel<Step<Kind::dplr>>(),
    &convolve,
    &ShortConvolution::scratch,
};

}  // namespace linstate::LINSTATE_VARIANT
