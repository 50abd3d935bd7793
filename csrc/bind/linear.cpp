// Packed linear layers: csrc/linear.hpp, linstate/ops/native/linear.py.

#include <cstring>
#include <string_view>

#include "bindings.hpp"
#include "cpu.hpp"
#include "linear.hpp"

namespace linstate {
namespace {

// Of the instruction set in use; where it has a core for bf16, that core's.
const LinearKernels& linear_in_use() {
#if defined(LINSTATE_X86)
    [[maybe_unused]] const std::string_view isa = kernels_in_use().isa;
#if defined(LINSTATE_AMX)
    if (isa == "amx") return amx::linear_tiles;
#endif
#if defined(LINSTATE_AVX512_BF16)
    if (isa == "avx512" && detect().avx512_bf16) return avx512_bf16::linear_dots;
#endif
#if defined(LINSTATE_EMULATED)
    if (isa == "emulated-amx") return emulated::linear_tiles;
    if (isa == "emulated-avx512") return emulated::linear_dots;
#endif
#endif
    return LINSTATE_IN_USE(linear);
}

// Words and scales of a packed weight of so many rows and (padded) columns.
struct Weight {
    const void* words;
    const std::uint16_t* scales;
};
Weight packed(const Check& check, Format format, const Tensor& words, const MaybeTensor& scales, Size n, Size k) {
    const Size panels = (n + PANEL - 1) / PANEL;
    check.that(scales.given == (format != Format::bf16), "codes have scales, and bf16 has none");
    return {check.whole("words", words, {panels, panel_words(k, format) / PANEL, PANEL}, Tensor::Type::i32),
            check.narrow("scales", scales, {panels, k / GROUP, PANEL})};
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

// x bf16 [..., k], k as padded; out [..., n].
LinearCall read_linear(Format format, const Tensor& x, const Tensor& words, const MaybeTensor& scales, const MaybeTensor& bias,
                       const Tensor& out) {
    const Check check("linear");
    LinearCall call;
    call.rows = rows_of(x), call.k = x.last(), call.n = out.last(), call.format = format;
    check.that(call.k % LINEAR_STEP == 0, "the columns of x must be filled up to whole groups");
    const Sequence from = check.rows("x", x, call.rows, call.k);
    // Kernels read pairs of numbers at once.
    check.that(x.narrow() && (call.rows == 1 || from.batch % 2 == 0) && reinterpret_cast<std::uintptr_t>(from.data) % 4 == 0,
               "x must be bfloat16, its rows at multiples of four bytes");
    call.x = static_cast<const std::uint16_t*>(from.data), call.x_stride = from.batch;
    const Weight weight = packed(check, format, words, scales, call.n, call.k);
    call.weight = weight.words, call.scales = weight.scales;
    call.bias = check.weight("bias", bias, call.n);
    call.out = check.rows_out("out", out, call.rows, call.n);
    return call;
}

void run_call(const LinearCall& call, int threads) {
    if (call.rows <= 0) return;
    const LinearKernels& kernels = linear_in_use();
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
    const LinearKernels& kernels = linear_in_use();
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

// ids int64 [...], out bf16 [..., k].
EmbedCall read_embed(Format format, Size outputs, Size inputs, const Tensor& ids, const Tensor& words, const MaybeTensor& scales,
                     const Tensor& out) {
    const Check check("embed");
    check.that(outputs > 0 && inputs > 0, "a weight has rows and columns");
    EmbedCall call;
    call.rows = numbers_of(ids);
    call.n = outputs, call.k = inputs, call.kp = (inputs + LINEAR_STEP - 1) / LINEAR_STEP * LINEAR_STEP, call.format = format;
    const Weight weight = packed(check, format, words, scales, call.n, call.kp);
    call.weight = weight.words, call.scales = weight.scales;
    call.ids = static_cast<const Size*>(check.flat("ids", ids, call.rows, Tensor::Type::i64));
    call.out = static_cast<std::uint16_t*>(const_cast<void*>(check.flat("out", out, call.rows * inputs, Tensor::Type::bf16)));
    return call;
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

LINSTATE_BINDINGS(linear) {
    nb::enum_<Format>(to.module, "Format", "Of a packed weight.")
        .value("bf16", Format::bf16)
        .value("int8", Format::int8)
        .value("int4", Format::int4);
    define(to, "linear", &read_linear, "y = x W^T + bias with a packed weight; see linstate/ops/native/linear.py.",
           nb::arg("format"), nb::arg("x"), nb::arg("words"), nb::arg("scales").none(), nb::arg("bias").none(), nb::arg("out"));
    define(to, "embed", &read_embed, "Rows of a packed weight; see linstate/ops/native/linear.py.", nb::arg("format"),
           nb::arg("outputs"), nb::arg("inputs"), nb::arg("ids"), nb::arg("words"), nb::arg("scales").none(), nb::arg("out"));
}

}  // namespace linstate
