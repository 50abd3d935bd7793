// The kernels of one instruction set that walk token by token; see variant.cpp.
#include "token.hpp"

#include "attend.hpp"
#include "conv.hpp"
#include "entry.hpp"
#include "mixer.hpp"
#include "rwkv.hpp"
#include "scan.hpp"
#include "step.hpp"

namespace linstate::LINSTATE_VARIANT {
namespace {

void convolve(const ConvCall& call, const ConvTask& task, void* scratch) {
    const FlushDenormals flush;
    ShortConvolution::run(call, task, scratch);
}

void mix(const MixerCall& call, Size row, Size key_head, Size from, Size to, bool more, void* scratch) {
    const FlushDenormals flush;
    MixerStep::run(call, row, key_head, from, to, more, scratch);
    if (call.past) streamed();
}

void mix_finish(const MixerCall& call, Size row, Size key_head, void* scratch) {
    const FlushDenormals flush;
    MixerStep::finish(call, row, key_head, scratch);
}

void shift(const ShiftCall& call, Size row) {
    const FlushDenormals flush;
    token_shift(call, row);
}

void rwkv7(const Rwkv7Call& call, Size row, Size head, bool more, void* scratch) {
    const FlushDenormals flush;
    Rwkv7Step::run(call, row, head, more, scratch);
    if (call.past) streamed();
}

void attend_begin(const AttendCall& call, Size row, void* scratch) {
    const FlushDenormals flush;
    AttendStep::begin(call, row, scratch);
}

void attend(const AttendCall& call, Size row, Size key_head, Size block, void* scratch) {
    const FlushDenormals flush;
    AttendStep::run(call, row, key_head, block, scratch);
}

void attend_end(const AttendCall& call, Size row, Size key_head, void* scratch) {
    const FlushDenormals flush;
    AttendStep::end(call, row, key_head, scratch);
}

}  // namespace

const TokenKernels token_kernels = {
    kernel<SelectiveScan>(),
    kernel<Step<Kind::linear_attention>>(),
    kernel<Step<Kind::delta_rule>>(),
    kernel<Step<Kind::dplr>>(),
    &convolve,
    &ShortConvolution::scratch,
    &mix,
    &mix_finish,
    &MixerStep::scratch,
    &shift,
    &rwkv7,
    &Rwkv7Step::scratch,
    &attend_begin,
    &attend,
    &attend_end,
    &AttendStep::scratch,
};

}  // namespace linstate::LINSTATE_VARIANT
