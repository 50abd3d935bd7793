// Norms with their gate, products with a gate, activations, sums: csrc/norm.hpp, linstate/ops/native/norm.py.

#include "bindings.hpp"
#include "block.hpp"
#include "norm.hpp"

namespace linstate {

// x, z, out [..., groups * size]; weight and bias [size] or [groups * size].
NormCall read_norm(const Tensor& x, Size groups, float eps, bool centre, const MaybeTensor& weight, float weight_plus,
                   const MaybeTensor& bias, NormCall::Gate gate, const MaybeTensor& z, const Tensor& out) {
    const Check check("norm");
    const Size rows = rows_of(x), wide = x.last();
    check.that(groups > 0 && wide % groups == 0, "the last axis of x must be a multiple of groups");
    check.that(z.given == (gate != NormCall::Gate::none), "a gate needs its z, and z a gate");
    NormCall call;
    call.rows = rows, call.groups = groups, call.size = wide / groups, call.centre = centre, call.eps = eps;
    const auto weights = [&](const char* name, const Tensor& t) {
        const bool one = t && t.last() == call.size;  // of a group, the same for all
        Sequence s = check.weight(name, t, one ? call.size : wide);
        s.head = one ? 0 : call.size;
        return s;
    };
    call.weight = weights("weight", weight), call.bias = weights("bias", bias);
    call.weight_plus = weight_plus, call.gate = gate;
    call.x = check.rows("x", x, rows, wide), call.z = check.rows("z", z, rows, wide);
    call.out = check.rows_out("out", out, rows, wide);
    call.x.head = call.z.head = call.out.head = call.size;
    return call;
}

// Rows [first, last) in one task, or two for each thread.
template <class Call>
struct Stretches {
    const Call* call;
    const NormKernels* kernels;
    Size each;

    Stretches(const Call& of, double numbers, int threads) : call(&of), kernels(&LINSTATE_IN_USE(norm)), each(of.rows) {
        if (numbers > 30e3 && threads > 1) each = (of.rows + 2 * threads - 1) / (2 * threads);
    }
    Size tasks() const { return (call->rows + each - 1) / each; }
    Size first(Size task) const { return task * each; }
    Size last(Size task) const { return first(task) + each < call->rows ? first(task) + each : call->rows; }
};

void run_call(const NormCall& call, int threads) {
    if (call.rows <= 0) return;
    const double numbers = double(call.rows) * double(call.groups) * double(call.size);  // about a nanosecond each
    const Stretches<NormCall> work(call, numbers, threads);
    pool_tasks(work.tasks(), threads, norm_scratch(call.size), &work, [](const void* context, Size task, void* scratch) {
        const auto& w = *static_cast<const Stretches<NormCall>*>(context);
        w.kernels->run(*w.call, w.first(task), w.last(task), scratch);
    });
}

// x [rows, 2 n], out [rows, n], bf16
GatedCall read_gated(const Tensor& x, const Tensor& out) {
    const Check check("gated");
    check.that(x.narrow() && x.last() % 2 == 0, "x must be bfloat16 [..., 2 n]");
    const Size rows = rows_of(x), n = x.last() / 2;
    const Sequence from = check.rows("x", x, rows, 2 * n);
    auto* to = const_cast<void*>(check.flat("out", out, rows * n, Tensor::Type::bf16));
    return {rows, n, static_cast<const std::uint16_t*>(from.data), from.batch, static_cast<std::uint16_t*>(to)};
}

void run_call(const GatedCall& call, int threads) {
    if (call.rows <= 0) return;
    const Stretches<GatedCall> work(call, double(call.rows) * double(call.n), threads);
    pool_tasks(work.tasks(), threads, 64, &work, [](const void* context, Size task, void*) {
        const auto& w = *static_cast<const Stretches<GatedCall>*>(context);
        w.kernels->gated(*w.call, w.first(task), w.last(task));
    });
}

ActivationCall read_activation(ActivationCall::Kind kind, const Tensor& x, const Tensor& out) {
    const Check check("activate");
    const Size n = numbers_of(x);
    const void* from = check.flat("x", x, n, Tensor::Type::bf16);
    auto* to = const_cast<void*>(check.flat("out", out, n, Tensor::Type::bf16));
    return {kind, n, static_cast<const std::uint16_t*>(from), static_cast<std::uint16_t*>(to)};
}

void run_call(const ActivationCall& call, int threads) {
    constexpr Size kEach = 1 << 14;
    struct Work {
        const ActivationCall* call;
        const NormKernels* kernels;
    } const work{&call, &LINSTATE_IN_USE(norm)};
    pool_tasks((call.n + kEach - 1) / kEach, worth(0.5 * double(call.n), threads), 64, &work,
               [](const void* context, Size task, void*) {
                   const Work& w = *static_cast<const Work*>(context);
                   ActivationCall part = *w.call;
                   part.x += task * kEach, part.out += task * kEach;
                   part.n = part.n - task * kEach < kEach ? part.n - task * kEach : kEach;
                   w.kernels->activate(part);
               });
}

// x bf16, or float32 with `read` in bf16.
AddCall read_add(const Tensor& x, const Tensor& y, const MaybeTensor& read, bool fresh) {
    const Check check("add");
    const Size n = numbers_of(x);
    check.that(!fresh || read.given, "fresh is of a sum in float32");
    AddCall call;
    call.n = n, call.fresh = fresh;
    call.x = const_cast<void*>(check.flat("x", x, n, read ? Tensor::Type::f32 : Tensor::Type::bf16));
    call.y = static_cast<const std::uint16_t*>(check.flat("y", y, n, Tensor::Type::bf16));
    call.read = static_cast<std::uint16_t*>(const_cast<void*>(check.flat("read", read, n, Tensor::Type::bf16)));
    return call;
}

void run_call(const AddCall& call, int) { LINSTATE_IN_USE(norm).add(call); }

StreamCall read_stream(const Tensor& x, const Tensor& y, const Tensor& out) {
    const Check check("stream");
    const Size n = numbers_of(x);
    StreamCall call;
    call.n = n;
    call.x = static_cast<const float*>(check.flat("x", x, n, Tensor::Type::f32));
    call.y = static_cast<const std::uint16_t*>(check.flat("y", y, n, Tensor::Type::bf16));
    call.out = static_cast<float*>(const_cast<void*>(check.flat("out", out, n, Tensor::Type::f32)));
    return call;
}

void run_call(const StreamCall& call, int threads) {
    by_rows(call, LINSTATE_IN_USE(between).stream, (call.n + STREAM_ROW - 1) / STREAM_ROW, 0.3 * double(STREAM_ROW), 64, threads);
}

LINSTATE_BINDINGS(norm) {
    nb::enum_<NormCall::Gate>(to.module, "OutputGate", "What z passes before it multiplies.")
        .value("none", NormCall::Gate::none)
        .value("silu", NormCall::Gate::silu)
        .value("sigmoid", NormCall::Gate::sigmoid);
    nb::enum_<ActivationCall::Kind>(to.module, "Activation")
        .value("sigmoid", ActivationCall::Kind::sigmoid)
        .value("tanh", ActivationCall::Kind::tanh)
        .value("relu_squared", ActivationCall::Kind::relu_squared);
    define(to, "norm", &read_norm, "A norm over the last axis with its gate; see linstate/ops/native/norm.py.", nb::arg("x"),
           nb::arg("groups"), nb::arg("eps"), nb::arg("centre"), nb::arg("weight").none(), nb::arg("weight_plus"),
           nb::arg("bias").none(), nb::arg("gate"), nb::arg("z").none(), nb::arg("out"));
    define(to, "gated", &read_gated, "silu(x) y of the two halves of rows.", nb::arg("x"), nb::arg("out"));
    define(to, "activate", &read_activation, "An activation of numbers in bf16.", nb::arg("kind"), nb::arg("x"), nb::arg("out"));
    define(to, "add", &read_add, "x += y; `read` is the sum in bf16, where x is float32.", nb::arg("x"), nb::arg("y"),
           nb::arg("read").none(), nb::arg("fresh"));
    define(to, "stream", &read_stream, "A residual stream in float32 and what a branch made.", nb::arg("x"), nb::arg("y"),
           nb::arg("out"));
}

}  // namespace linstate
