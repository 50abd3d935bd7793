// What the bindings and the kernels agree on about what works on whole rows: norms over the last axis, products with a gate,
// sums. Their table, apart from kernels.hpp as linear.hpp's.
#pragma once

#include "kernels.hpp"

namespace linstate {

// out [rows, groups, size] = (x - mean) / sqrt(var + eps) * weight + bias, times an activation of a gate. Without `centre` the
// mean counts as 0 (rms norm). Everything in float32 between reading and writing; an
// x in float32 whose norm is wanted in bf16 is rounded to that first.
struct NormCall {
    using Gate = OutputGate;

    Size rows = 0, groups = 0, size = 0;
    bool centre = false;
    float eps = 0.0f;
    Sequence x, z;         // batch is the stride of rows, head that of groups
    Sequence weight, bias; // [size], or [groups * size] with head = size; or nothing
    float weight_plus = 0.0f;  // added to each weight
    Gate gate = Gate::none;
    Output out;            // as x
};

// out [rows, n] = silu(x[:, :n]) * x[:, n:]; bf16
struct GatedCall {
    Size rows = 0, n = 0;
    const std::uint16_t* x = nullptr;
    Size x_stride = 0;
    std::uint16_t* out = nullptr;  // without gaps
};

// out = act(x), n numbers; bf16
struct ActivationCall {
    enum class Kind : int { sigmoid = 0, tanh = 1, relu_squared = 2 };

    Kind kind = Kind::sigmoid;
    Size n = 0;
    const std::uint16_t* x = nullptr;
    std::uint16_t* out = nullptr;
};

// x += y, n numbers, y in bf16. Where x is float32, `read` is the sum in bf16: what the next branch reads.
struct AddCall {
    Size n = 0;
    void* x = nullptr;
    const std::uint16_t* y = nullptr;
    std::uint16_t* read = nullptr;  // null: x is bf16
    bool fresh = false;             // x = y; only of float32
};

struct NormKernels {
    void (*run)(const NormCall&, Size first, Size last, void* scratch) = nullptr;  // rows [first, last)
    void (*gated)(const GatedCall&, Size first, Size last) = nullptr;
    void (*add)(const AddCall&) = nullptr;
    void (*activate)(const ActivationCall&) = nullptr;
};

inline std::size_t norm_scratch(Size size) { return std::size_t(size + 64) * 4 * 2 + 128; }

LINSTATE_EVERY_SET(NormKernels, norm)

}  // namespace linstate
