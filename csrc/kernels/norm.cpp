// Norms over the last axis with their gate, products with a gate, sums, of one instruction set. Compiled once for each, as variant.cpp is.
#include "norm.hpp"

#include "chunk.hpp"
#include "entry.hpp"

namespace linstate::LINSTATE_VARIANT {
namespace {

void one_group(const NormCall& call, Size row, Size group, float* x, float* other) {
    const Size n = call.size, padded = round_up(n, W), whole = n / W * W;
    read_row(x, call.x.data, call.x.dtype, row * call.x.batch + group * call.x.head, n, padded, 1.0f);
    if (call.x.dtype == Dtype::f32 && call.out.dtype == Dtype::bf16)
        for (Size i = 0; i < padded; i += W) store(x + i, bits(bf16_bits(load(x + i)) << 16));
    if (call.centre) {
        F total = F{};
        for (Size i = 0; i < padded; i += W) total += load(x + i);
        const F mean = all(sum(total) / float(n));
        for (Size i = 0; i < whole; i += W) store(x + i, load(x + i) - mean);
        for (Size i = whole; i < n; ++i) x[i] -= mean[0];
    }
    const float factor = 1.0f / __builtin_sqrtf(dot(x, x, padded) / float(n) + call.eps);
    if (call.weight.data) {
        read_row(other, call.weight.data, call.weight.dtype, group * call.weight.head, n, padded, 1.0f);
        const F plus = all(call.weight_plus), f = all(factor);
        for (Size i = 0; i < padded; i += W) store(x + i, load(x + i) * f * (load(other + i) + plus));
    } else {
        multiply(x, factor, padded);
    }
    if (call.bias.data) {
        read_row(other, call.bias.data, call.bias.dtype, group * call.bias.head, n, padded, 1.0f);
        for (Size i = 0; i < padded; i += W) store(x + i, load(x + i) + load(other + i));
    }
    if (call.gate != NormCall::Gate::none) {
        read_row(other, call.z.data, call.z.dtype, row * call.z.batch + group * call.z.head, n, padded, 1.0f);
        const bool silu_gate = call.gate == NormCall::Gate::silu;
        for (Size i = 0; i < padded; i += W) {
            const F z = load(other + i), s = sigmoid(z);
            store(x + i, load(x + i) * (silu_gate ? z * s : s));
        }
    }
    write_row(call.out.data, call.out.dtype, row * call.out.batch + group * call.out.head, x, n);
}

void run_norm(const NormCall& call, Size first, Size last, void* scratch) {
    const FlushDenormals flush;
    Arena arena(scratch);
    float* x = arena.floats(round_up(call.size, W));
    float* other = arena.floats(round_up(call.size, W));
    for (Size row = first; row < last; ++row)
        for (Size group = 0; group < call.groups; ++group) one_group(call, row, group, x, other);
}

void run_gated(const GatedCall& call, Size first, Size last) {
    const FlushDenormals flush;
    for (Size row = first; row < last; ++row) {
        const std::uint16_t *x = call.x + row * call.x_stride, *y = x + call.n;
        std::uint16_t* out = call.out + row * call.n;
        Size i = 0;
        for (; i + W <= call.n; i += W) store_bf16(out + i, silu(load_bf16(x + i)) * load_bf16(y + i));
        for (; i < call.n; ++i) out[i] = to_bf16((silu(all(from_bf16(x[i]))) * from_bf16(y[i]))[0]);
    }
}

void run_add(const AddCall& call) {
    Size i = 0;
    if (call.read) {
        float* x = static_cast<float*>(call.x);
        for (; i + W <= call.n; i += W) {
            const F y = load_bf16(call.y + i), s = call.fresh ? y : load(x + i) + y;
            store(x + i, s), store_bf16(call.read + i, s);
        }
        for (; i < call.n; ++i) {
            x[i] = (call.fresh ? 0.0f : x[i]) + from_bf16(call.y[i]);
            call.read[i] = to_bf16(x[i]);
        }
        return;
    }
    std::uint16_t* x = static_cast<std::uint16_t*>(call.x);
    for (; i + W <= call.n; i += W) store_bf16(x + i, load_bf16(x + i) + load_bf16(call.y + i));
    for (; i < call.n; ++i) x[i] = to_bf16(from_bf16(x[i]) + from_bf16(call.y[i]));
}

LINSTATE_INLINE F activated(ActivationCall::Kind kind, F x) {
    if (kind == ActivationCall::Kind::relu_squared) {
        const F positive = select(x <= 0.0f, F{}, x);  // NaN stays NaN
        return positive * positive;
    }
    if (kind == ActivationCall::Kind::sigmoid) return sigmoid(x);
    // 2 sigmoid(2 x) - 1 cancels near 0, where tanh x = x (1 - x^2 / 3 + 2 x^4 / 15 - 17 x^6 / 315) to 1e-6 for |x| < 1/4
    const F square = x * x;
    const F near = x * (square * (square * (square * (-17.0f / 315.0f) + 2.0f / 15.0f) - 1.0f / 3.0f) + 1.0f);
    return select(square < 0.0625f, near, sigmoid(x + x) * 2.0f - 1.0f);
}

void run_activate(const ActivationCall& call) {
    Size i = 0;
    for (; i + W <= call.n; i += W) store_bf16(call.out + i, activated(call.kind, load_bf16(call.x + i)));
    for (; i < call.n; ++i) call.out[i] = to_bf16(activated(call.kind, all(from_bf16(call.x[i])))[0]);
}

}  // namespace

const NormKernels norm = {&run_norm, &run_gated, &run_add, &run_activate};

}  // namespace linstate::LINSTATE_VARIANT
