// The bindings of what many tokens of a mixer pass before and behind the recurrence; see module.cpp.

#include <string_view>

#include "bindings.hpp"
#include "block.hpp"
#include "pool.hpp"

namespace linstate {
namespace {

const BlockKernels& block_in_use() {
#if defined(LINSTATE_X86)
    const std::string_view isa = kernels_in_use().isa;
    if (isa == "amx" || isa == "avx512") return avx512::between;
    if (isa == "avx2") return avx2::between;
#if defined(LINSTATE_EMULATED)
    if (isa == "emulated-amx" || isa == "emulated-avx512" || isa == "wide") return wide::between;
#endif
#endif
    return portable::between;
}

Output output(nb::handle h) {
    const Sequence s = rows_of(h);
    Output o;
    o.data = const_cast<void*>(s.data), o.batch = s.batch, o.dtype = s.dtype;
    return o;
}

// `nanoseconds`: of a row, about.
template <class Call>
void by_rows(const Call& call, void (*run)(const Call&, Size, Size, void*), Size rows, double nanoseconds, std::size_t scratch,
             int threads) {
    constexpr Size kEach = 16;
    struct Work {
        const Call* call;
        void (*run)(const Call&, Size, Size, void*);
        Size rows;
    } const work{&call, run, rows};
    pool_tasks((rows + kEach - 1) / kEach, worth(nanoseconds * double(rows), threads), scratch, &work,
               [](const void* context, Size task, void* scratch) {
                   const Work& w = *static_cast<const Work*>(context);
                   const Size first = task * kEach;
                   w.run(*w.call, first, first + kEach < w.rows ? first + kEach : w.rows, scratch);
               });
}

// `sizes`, `numbers` and `tensors` as of a step (bind_token.cpp); the others (address, row stride, is bf16), or None.
void mixer_gates(const nb::tuple& sizes, const nb::tuple& numbers, Size rows, const nb::tuple& tensors, const nb::tuple& outs,
                 int threads) {
    MixerGates call;
    call.mixer = read_mixer(sizes, numbers, rows, tensors, nb::none());
    call.q = output(outs[0]), call.key = output(outs[1]), call.value = output(outs[2]);
    call.beta = output(outs[3]), call.g = output(outs[4]);
    nb::gil_scoped_release release;
    const MixerCall& c = call.mixer;
    by_rows(call, block_in_use().gates, rows, 0.5 * double(c.hk * c.k + c.hv * c.v), block_scratch(c), threads);
}

void mixer_finish(const nb::tuple& sizes, const nb::tuple& numbers, Size rows, const nb::tuple& tensors, const nb::tuple& made,
                  const nb::tuple& out, int threads) {
    MixerFinish call;
    call.mixer = read_mixer(sizes, numbers, rows, tensors, out);
    call.made = rows_of(made);
    nb::gil_scoped_release release;
    by_rows(call, block_in_use().finish, rows, 0.7 * double(call.mixer.hv * call.mixer.v), block_scratch(call.mixer), threads);
}

void shift_tokens(Size rows, Size tokens, Size n, Size count, const nb::tuple& x, const nb::tuple& mix, const nb::tuple& out,
                  nb::handle before, int threads) {
    ShiftTokens call;
    call.shift = read_shift(rows, n, count, x, mix, out), call.tokens = tokens;
    call.shift.before = address<const float>(before);
    nb::gil_scoped_release release;
    by_rows(call, block_in_use().shift, rows, 0.2 * double(n * (count + 1)), block_scratch(call.shift), threads);
}

// `tensors` as of a step (bind_rwkv.cpp).
void rwkv7_gates(Size rows, Size heads, Size size, const nb::tuple& tensors, const nb::tuple& outs, int threads) {
    Rwkv7Gates call;
    call.mixer = read_rwkv7(rows, heads, size, 0.0f, tensors, nb::none());
    call.key = output(outs[0]), call.value = output(outs[1]);
    call.a = output(outs[2]), call.b = output(outs[3]), call.g = output(outs[4]);
    nb::gil_scoped_release release;
    by_rows(call, block_in_use().rwkv7_gates, rows, 1.5 * double(heads * size), block_scratch(call.mixer), threads);
}

void rwkv7_finish(Size rows, Size heads, Size size, float eps, const nb::tuple& tensors, const nb::tuple& made,
                  const nb::tuple& out, int threads) {
    Rwkv7Finish call;
    call.mixer = read_rwkv7(rows, heads, size, eps, tensors, out);
    call.made = rows_of(made);
    nb::gil_scoped_release release;
    by_rows(call, block_in_use().rwkv7_finish, rows, double(heads * size), block_scratch(call.mixer), threads);
}

void stream(Size n, nb::handle x, nb::handle y, nb::handle out, int threads) {
    const StreamCall call{n, address<const float>(x), address<const std::uint16_t>(y), address<float>(out)};
    nb::gil_scoped_release release;
    by_rows(call, block_in_use().stream, (n + STREAM_ROW - 1) / STREAM_ROW, 0.3 * double(STREAM_ROW), 64, threads);
}

}  // namespace

void bind_block(nb::module_& m) {
    m.def("mixer_gates", &mixer_gates, nb::arg("sizes"), nb::arg("numbers"), nb::arg("rows"), nb::arg("tensors"),
          nb::arg("outs"), nb::arg("threads"), "What stands before a mixer's recurrence; see linstate/ops/native/block.py.");
    m.def("mixer_finish", &mixer_finish, nb::arg("sizes"), nb::arg("numbers"), nb::arg("rows"), nb::arg("tensors"),
          nb::arg("made"), nb::arg("out"), nb::arg("threads"), "What stands behind it; see linstate/ops/native/block.py.");
    m.def("shift_tokens", &shift_tokens, nb::arg("rows"), nb::arg("tokens"), nb::arg("n"), nb::arg("count"), nb::arg("x"),
          nb::arg("mix"), nb::arg("out"), nb::arg("before").none(), nb::arg("threads"),
          "RWKV's shift of many tokens; see linstate/ops/native/block.py.");
    m.def("rwkv7_gates", &rwkv7_gates, nb::arg("rows"), nb::arg("heads"), nb::arg("size"), nb::arg("tensors"), nb::arg("outs"),
          nb::arg("threads"), "What stands before RWKV-7's recurrence; see linstate/ops/native/block.py.");
    m.def("rwkv7_finish", &rwkv7_finish, nb::arg("rows"), nb::arg("heads"), nb::arg("size"), nb::arg("eps"), nb::arg("tensors"),
          nb::arg("made"), nb::arg("out"), nb::arg("threads"), "What stands behind it; see linstate/ops/native/block.py.");
    m.def("stream", &stream, nb::arg("n"), nb::arg("x"), nb::arg("y"), nb::arg("out"), nb::arg("threads"),
          "A residual stream in float32 and what a branch made; see linstate/ops/native/norm.py.");
}

}  // namespace linstate
