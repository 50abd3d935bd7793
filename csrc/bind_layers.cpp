// The bindings of what stands between the recurrences of a model: packed linear layers and norms; see module.cpp.

#include <cstring>
#include <stdexcept>
#include <string_view>

#include "bindings.hpp"
#include "cpu.hpp"
#include "linear.hpp"
#include "norm.hpp"
#include "pool.hpp"

namespace linstate {
namespace {

struct Layers {
    const LinearKernels* linear;
    const NormKernels* norm;
};

// Of the instruction set in use (`_native.use`), by its name.
Layers layers_in_use() {
    const std::string_view isa = kernels_in_use().isa;
#if defined(LINSTATE_X86)
#if defined(LINSTATE_AMX)
    if (isa == "amx") return {&amx::linear_tiles, &avx512::norm};
#endif
#if defined(LINSTATE_AVX512_BF16)
    if (isa == "avx512" && detect().avx512_bf16) return {&avx512_bf16::linear_dots, &avx512::norm};
#endif
    if (isa == "avx512") return {&avx512::linear, &avx512::norm};
    if (isa == "avx2") return {&avx2::linear, &avx2::norm};
#if defined(LINSTATE_EMULATED)
    if (isa == "emulated-amx") return {&emulated::linear_tiles, &wide::norm};
    if (isa == "emulated-avx512") return {&emulated::linear_dots, &wide::norm};
    if (isa == "wide") return {&wide::linear, &wide::norm};
#endif
#endif
    return {&portable::linear, &portable::norm};
}

// (address, stride of rows, stride of groups, is bf16), or None
Sequence grouped(nb::handle h) {
    Sequence s;
    if (h.is_none()) return s;
    const nb::tuple t = nb::cast<nb::tuple>(h);
    s.data = address<const void>(t[0]);
    s.batch = nb::cast<Size>(t[1]), s.head = nb::cast<Size>(t[2]);
    s.dtype = nb::cast<bool>(t[3]) ? Dtype::bf16 : Dtype::f32;
    return s;
}

float as_float(std::uint16_t bf16) {
    const std::uint32_t bits = std::uint32_t(bf16) << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// Rounded to nearest even; codes times scales are never NaN but where a scale is.
std::uint16_t as_bf16(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (x != x) return std::uint16_t((bits >> 16) | 0x40);
    return std::uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace

// gate: 0 none, 1 silu, 2 sigmoid
NormCall read_norm(Size rows, Size groups, Size size, bool centre, float eps, const nb::tuple& x, nb::handle weight,
                   float weight_plus, nb::handle bias, int gate, nb::handle z, const nb::tuple& out) {
    NormCall call;
    call.rows = rows, call.groups = groups, call.size = size, call.centre = centre, call.eps = eps;
    call.x = grouped(x), call.z = grouped(z), call.weight = grouped(weight), call.bias = grouped(bias);
    call.weight_plus = weight_plus, call.gate = static_cast<NormCall::Gate>(gate);
    const Sequence o = grouped(out);
    call.out.data = const_cast<void*>(o.data), call.out.batch = o.batch, call.out.head = o.head, call.out.dtype = o.dtype;
    return call;
}

void run_call(const NormCall& call, int threads) {
    if (call.rows <= 0) return;
    struct Work {
        const NormCall* call;
        const NormKernels* kernels;
        Size each;
    } work{&call, layers_in_use().norm, call.rows};
    const double numbers = double(call.rows) * double(call.groups) * double(call.size);  // about a nanosecond each
    if (numbers > 30e3 && threads > 1) work.each = (call.rows + 2 * threads - 1) / (2 * threads);
    pool_tasks((call.rows + work.each - 1) / work.each, threads, norm_scratch(call.size), &work,
               [](const void* context, Size task, void* scratch) {
                   const Work& w = *static_cast<const Work*>(context);
                   const Size first = task * w.each, last = first + w.each < w.call->rows ? first + w.each : w.call->rows;
                   w.kernels->run(*w.call, first, last, scratch);
               });
}

// x: (address, row stride) of bf16 [rows, 2 n]; out: address of bf16 [rows, n].
GatedCall read_gated(Size rows, Size n, const nb::tuple& x, nb::handle out) {
    return {rows, n, address<const std::uint16_t>(x[0]), nb::cast<Size>(x[1]), address<std::uint16_t>(out)};
}

void run_call(const GatedCall& call, int threads) {
    if (call.rows <= 0) return;
    struct Work {
        const GatedCall* call;
        const NormKernels* kernels;
        Size each;
    } work{&call, layers_in_use().norm, call.rows};
    if (double(call.rows) * double(call.n) > 30e3 && threads > 1) work.each = (call.rows + 2 * threads - 1) / (2 * threads);
    pool_tasks((call.rows + work.each - 1) / work.each, threads, 64, &work, [](const void* context, Size task, void*) {
        const Work& w = *static_cast<const Work*>(context);
        const Size first = task * w.each, last = first + w.each < w.call->rows ? first + w.each : w.call->rows;
        w.kernels->gated(*w.call, first, last);
    });
}

// kind: 0 sigmoid, 1 tanh, 2 relu squared
ActivationCall read_activation(int kind, Size n, nb::handle x, nb::handle out) {
    return {static_cast<ActivationCall::Kind>(kind), n, address<const std::uint16_t>(x), address<std::uint16_t>(out)};
}

void run_call(const ActivationCall& call, int threads) {
    constexpr Size kEach = 1 << 14;
    struct Work {
        const ActivationCall* call;
        const NormKernels* kernels;
    } const work{&call, layers_in_use().norm};
    pool_tasks((call.n + kEach - 1) / kEach, worth(0.5 * double(call.n), threads), 64, &work,
               [](const void* context, Size task, void*) {
                   const Work& w = *static_cast<const Work*>(context);
                   ActivationCall part = *w.call;
                   part.x += task * kEach, part.out += task * kEach;
                   part.n = part.n - task * kEach < kEach ? part.n - task * kEach : kEach;
                   w.kernels->activate(part);
               });
}

void run_call(const AddCall& call, int) { layers_in_use().norm->add(call); }

// format: bits of a weight. x: (address, row stride) of bf16 [rows, k]. bias: (address, is bf16) or None.
// out: (address, row stride, is bf16).
LinearCall read_linear(int format, Size rows, Size n, Size k, const nb::tuple& x, nb::handle weight, nb::handle scales,
                       nb::handle bias, const nb::tuple& out) {
    LinearCall call;
    call.rows = rows, call.n = n, call.k = k, call.format = static_cast<Format>(format);
    call.x = address<const std::uint16_t>(x[0]), call.x_stride = nb::cast<Size>(x[1]);
    call.weight = address<const void>(weight), call.scales = address<const std::uint16_t>(scales);
    if (!bias.is_none()) {
        const nb::tuple b = nb::cast<nb::tuple>(bias);
        call.bias.data = address<const void>(b[0]);
        call.bias.dtype = nb::cast<bool>(b[1]) ? Dtype::bf16 : Dtype::f32;
    }
    call.out.data = address<void>(out[0]), call.out.batch = nb::cast<Size>(out[1]);
    call.out.dtype = nb::cast<bool>(out[2]) ? Dtype::bf16 : Dtype::f32;
    return call;
}

void run_call(const LinearCall& call, int threads) {
    if (call.rows <= 0) return;
    const LinearKernels& kernels = *layers_in_use().linear;
    struct Work {
        const LinearCall* call;
        void (*run)(const LinearCall&, Size, Size, void*);
        Size panels, each;
    } work{&call, kernels.run, (call.n + PANEL - 1) / PANEL, 1};
    // Nanoseconds, about, on one thread: what is read at 20 GB/s, what is multiplied at 200 GFLOP/s.
    const double read = double(work.panels * panel_words(call.k, call.format)) * 4 / 20;
    const double multiplied = double(call.rows) * double(call.n) * double(call.k) / 100;
    threads = worth_calling(read + multiplied, threads);
    // A row reads each panel once: long stretches, eight for a thread. Many rows share panels out one by one.
    if (call.rows == 1 && threads > 0) work.each = (work.panels + 8 * threads - 1) / (8 * threads);
    pool_tasks((work.panels + work.each - 1) / work.each, threads, kernels.scratch(call), &work,
               [](const void* context, Size task, void* scratch) {
                   const Work& w = *static_cast<const Work*>(context);
                   const Size first = task * w.each, last = first + w.each < w.panels ? first + w.each : w.panels;
                   w.run(*w.call, first, last, scratch);
               });
}

bool LinearGroup::join(const LinearCall& call) {
    if (calls.size() == kMost || calls[0].rows != call.rows) return false;
    const auto* from = reinterpret_cast<const char*>(call.x);
    const char* to = from + ((call.rows - 1) * call.x_stride + call.k) * 2;
    for (const LinearCall& other : calls) {
        const auto* begin = static_cast<const char*>(other.out.data);
        const Size width = other.out.dtype == Dtype::bf16 ? 2 : 4;
        const char* end = begin + ((other.rows - 1) * other.out.batch + other.n) * width;
        if (from < end && begin < to) return false;
    }
    calls.push_back(call);
    return true;
}

void run_call(const LinearGroup& group, int threads) {
    if (group.calls.size() == 1 || group.calls[0].rows != 1) {
        for (const LinearCall& call : group.calls) run_call(call, threads);
        return;
    }
    const LinearKernels& kernels = *layers_in_use().linear;
    struct Work {
        const LinearGroup* group;
        void (*run)(const LinearCall&, Size, Size, void*);
        Size each[LinearGroup::kMost], end[LinearGroup::kMost];  // panels of a task, and behind which task a call ends
    } work{&group, kernels.run, {}, {}};
    double bytes = 0.0;
    std::size_t scratch = 0;
    const auto panels = [](const LinearCall& call) { return (call.n + PANEL - 1) / PANEL; };
    for (const LinearCall& call : group.calls) {
        bytes += double(panels(call) * panel_words(call.k, call.format)) * 4;
        const std::size_t wanted = kernels.scratch(call);
        if (wanted > scratch) scratch = wanted;
    }
    threads = worth_calling(bytes / 20, threads);
    Size tasks = 0;
    for (std::size_t i = 0; i < group.calls.size(); ++i) {
        const LinearCall& call = group.calls[i];
        const double most = bytes / (8 * threads) / double(4 * panel_words(call.k, call.format));
        work.each[i] = most > 1.0 ? Size(most + 0.5) : 1;
        tasks += (panels(call) + work.each[i] - 1) / work.each[i];
        work.end[i] = tasks;
    }
    pool_tasks(tasks, threads, scratch, &work, [](const void* context, Size task, void* scratch) {
        const Work& w = *static_cast<const Work*>(context);
        std::size_t i = 0;
        while (task >= w.end[i]) ++i;
        const LinearCall& call = w.group->calls[i];
        const Size all = (call.n + PANEL - 1) / PANEL, first = (task - (i > 0 ? w.end[i - 1] : 0)) * w.each[i];
        w.run(call, first, first + w.each[i] < all ? first + w.each[i] : all, scratch);
    });
}

EmbedCall read_embed(int format, Size rows, Size n, Size k, nb::handle ids, nb::handle weight, nb::handle scales, nb::handle out) {
    return {rows, n, k, (k + LINEAR_STEP - 1) / LINEAR_STEP * LINEAR_STEP, static_cast<Format>(format), address<const Size>(ids),
            address<const void>(weight), address<const std::uint16_t>(scales), address<std::uint16_t>(out)};
}

// A few thousand numbers of some rows: plain loops.
void run_call(const EmbedCall& call, int) {
    const int bits = int(call.format), pairs = 16 / bits;
    for (Size row = 0; row < call.rows; ++row) {
        if (call.ids[row] < 0 || call.ids[row] >= call.n) throw std::out_of_range("an id must be that of a row of the weight");
        const Size panel = call.ids[row] / PANEL, lane = call.ids[row] % PANEL;
        const auto* words = static_cast<const std::uint32_t*>(call.weight) + panel * panel_words(call.kp, call.format) + lane;
        std::uint16_t* out = call.out + row * call.k;
        for (Size p = 0; p < call.k; ++p) {
            // Of a word: even p in the lower half, odd ones in the upper, rising.
            const std::uint32_t word = words[p / (2 * pairs) * PANEL] >> (16 * (p % 2) + bits * (p / 2 % pairs));
            if (call.format == Format::bf16) {
                out[p] = std::uint16_t(word);
                continue;
            }
            const float scale = as_float(call.scales[(panel * (call.kp / GROUP) + p / GROUP) * PANEL + lane]);
            out[p] = as_bf16(float(int(word & ((1u << bits) - 1)) - (1 << (bits - 1))) * scale);
        }
    }
}

void bind_layers(nb::module_& m) {
    m.def("embed",
          [](int format, Size rows, Size n, Size k, nb::handle ids, nb::handle weight, nb::handle scales, nb::handle out) {
              run_call(read_embed(format, rows, n, k, ids, weight, scales, out), 1);
          },
          nb::arg("format"), nb::arg("rows"), nb::arg("n"), nb::arg("k"), nb::arg("ids"), nb::arg("weight"), nb::arg("scales").none(),
          nb::arg("out"), "Rows of a packed weight; see linstate/ops/native/linear.py.");
    m.def("norm",
          [](Size rows, Size groups, Size size, bool centre, float eps, const nb::tuple& x, nb::handle weight, float weight_plus,
             nb::handle bias, int gate, nb::handle z, const nb::tuple& out, int threads) {
              const NormCall call = read_norm(rows, groups, size, centre, eps, x, weight, weight_plus, bias, gate, z, out);
              nb::gil_scoped_release release;
              run_call(call, threads);
          },
          nb::arg("rows"), nb::arg("groups"), nb::arg("size"), nb::arg("centre"), nb::arg("eps"), nb::arg("x"),
          nb::arg("weight").none(), nb::arg("weight_plus"), nb::arg("bias").none(), nb::arg("gate"), nb::arg("z").none(),
          nb::arg("out"), nb::arg("threads"), "A norm over the last axis with its gate; see linstate/ops/native/norm.py.");
    m.def("gated",
          [](Size rows, Size n, const nb::tuple& x, nb::handle out, int threads) {
              const GatedCall call = read_gated(rows, n, x, out);
              nb::gil_scoped_release release;
              run_call(call, threads);
          },
          nb::arg("rows"), nb::arg("n"), nb::arg("x"), nb::arg("out"), nb::arg("threads"),
          "silu(x) y of the two halves of rows; see linstate/ops/native/norm.py.");
    m.def("activate",
          [](int kind, Size n, nb::handle x, nb::handle out, int threads) {
              const ActivationCall call = read_activation(kind, n, x, out);
              nb::gil_scoped_release release;
              run_call(call, threads);
          },
          nb::arg("kind"), nb::arg("n"), nb::arg("x"), nb::arg("out"), nb::arg("threads"), "See linstate/ops/native/norm.py.");
    m.def("linear",
          [](int format, Size rows, Size n, Size k, const nb::tuple& x, nb::handle weight, nb::handle scales, nb::handle bias,
             const nb::tuple& out, int threads) {
              const LinearCall call = read_linear(format, rows, n, k, x, weight, scales, bias, out);
              nb::gil_scoped_release release;
              run_call(call, threads);
          },
          nb::arg("format"), nb::arg("rows"), nb::arg("n"), nb::arg("k"), nb::arg("x"), nb::arg("weight"),
          nb::arg("scales").none(), nb::arg("bias").none(), nb::arg("out"), nb::arg("threads"),
          "y = x W^T + bias with a packed weight; see linstate/ops/native/linear.py.");
}

}  // namespace linstate
