// RWKV: the shift before the projections and RWKV-7's time mix between them, of one token and of many; csrc/rwkv.hpp, csrc/block.hpp.

#include "addresses.hpp"
#include "bindings.hpp"
#include "block.hpp"

namespace linstate {
namespace {

// x, mix: (address, row stride, is bf16); out: (address, stride of rates, is bf16), rows without gaps.
ShiftCall read_shift(Size rows, Size n, Size count, nb::handle x, nb::handle mix, nb::handle out) {
    ShiftCall call;
    call.rows = rows, call.n = n, call.count = count;
    call.x = row_sequence(x), call.mix = row_sequence(mix);
    const Sequence o = row_sequence(out);
    call.out.data = const_cast<void*>(o.data), call.out.time = o.batch, call.out.batch = n, call.out.dtype = o.dtype;
    return call;
}

// `tensors` in the order of linstate/ops/native/rwkv.py.
Rwkv7Call read_rwkv7(Size rows, Size heads, Size size, float eps, const nb::tuple& tensors, nb::handle out) {
    Rwkv7Call call;
    call.rows = rows, call.heads = heads, call.size = size, call.eps = eps;
    std::size_t i = 0;
    const auto tensor = [&] { return row_sequence(tensors[i++]); };
    call.r = tensor(), call.key = tensor(), call.value = tensor(), call.decay = tensor(), call.rate = tensor();
    call.value_rate = tensor(), call.first_value = tensor(), call.gate = tensor();
    call.k_k = tensor(), call.k_a = tensor(), call.r_k = tensor(), call.weight = tensor(), call.bias = tensor();
    const Sequence o = row_sequence(out);
    call.out.data = const_cast<void*>(o.data), call.out.batch = o.batch, call.out.dtype = o.dtype;
    return call;
}

float* floats(const Check& check, const char* name, const Tensor& t, Size numbers) {
    return static_cast<float*>(const_cast<void*>(check.flat(name, t, numbers, Tensor::Type::f32)));
}

}  // namespace

// Nothing, and x of the token before, [rows, n].
constexpr std::size_t states_of(const ShiftCall&) { return 2; }
void place_states(ShiftCall& call, const MaybeTensor* before, const MaybeTensor* after) {
    const Check check("shift");
    check.that(after[1].given, "the state after it is missing");
    call.before = floats(check, "before", before[1], call.rows * call.n);
    call.after = floats(check, "after", after[1], call.rows * call.n);
}

void run_call(const ShiftCall& call, int threads) {
    struct Work {
        const ShiftCall* call;
        void (*run)(const ShiftCall&, Size);
    } const job{&call, kernels_in_use().token->shift};
    pool_tasks(call.rows, worth(0.2 * double(call.rows) * double(call.n) * double(call.count), threads), 64, &job,
               [](const void* context, Size row, void*) {
                   const Work& w = *static_cast<const Work*>(context);
                   w.run(*w.call, row);
               });
}

// Nothing, and the matrix [rows, heads, size, size].
constexpr std::size_t states_of(const Rwkv7Call&) { return 2; }
void place_states(Rwkv7Call& call, const MaybeTensor* before, const MaybeTensor* after) {
    const Check check("rwkv7");
    check.that(after[1].given, "the matrix after it is missing");
    const Size numbers = call.rows * call.heads * call.size * call.size;
    call.before = floats(check, "before", before[1], numbers), call.after = floats(check, "after", after[1], numbers);
}

void run_call(const Rwkv7Call& call, int threads) {
    const TokenKernels& table = *kernels_in_use().token;
    const Size heads = call.rows * call.heads;
    const int used = worth_calling(0.25 * double(heads) * double(call.size * call.size), threads);
    struct Work {
        const Rwkv7Call* call;
        void (*run)(const Rwkv7Call&, Size, Size, bool, void*);
        Size heads, tasks;
    } const job{&call, table.rwkv7, heads, used == 1 ? 1 : heads < 2 * used ? heads : 2 * used};
    pool_tasks(job.tasks, used, table.rwkv7_scratch(call), &job, [](const void* context, Size task, void* scratch) {
        const Work& w = *static_cast<const Work*>(context);
        const Size last = (task + 1) * w.heads / w.tasks;
        for (Size head = task * w.heads / w.tasks; head < last; ++head)
            w.run(*w.call, head / w.call->heads, head % w.call->heads, head + 1 < last, scratch);
    });
}

namespace {

void shift_tokens(Size rows, Size tokens, Size n, Size count, nb::handle x, nb::handle mix, nb::handle out,
                  nb::handle before, int threads) {
    ShiftTokens call;
    call.shift = read_shift(rows, n, count, x, mix, out), call.tokens = tokens;
    call.shift.before = address<const float>(before);
    nb::gil_scoped_release release;
    by_rows(call, LINSTATE_IN_USE(between).shift, rows, 0.2 * double(n * (count + 1)), block_scratch(call.shift), threads);
}

// `tensors` as of a step (bind_rwkv.cpp).
void rwkv7_gates(Size rows, Size heads, Size size, const nb::tuple& tensors, const nb::tuple& outs, int threads) {
    Rwkv7Gates call;
    call.mixer = read_rwkv7(rows, heads, size, 0.0f, tensors, nb::none());
    call.key = row_output(outs[0]), call.value = row_output(outs[1]);
    call.a = row_output(outs[2]), call.b = row_output(outs[3]), call.g = row_output(outs[4]);
    nb::gil_scoped_release release;
    by_rows(call, LINSTATE_IN_USE(between).rwkv7_gates, rows, 1.5 * double(heads * size), block_scratch(call.mixer), threads);
}

void rwkv7_finish(Size rows, Size heads, Size size, float eps, const nb::tuple& tensors, nb::handle made,
                  nb::handle out, int threads) {
    Rwkv7Finish call;
    call.mixer = read_rwkv7(rows, heads, size, eps, tensors, out);
    call.made = row_sequence(made);
    nb::gil_scoped_release release;
    by_rows(call, LINSTATE_IN_USE(between).rwkv7_finish, rows, double(heads * size), block_scratch(call.mixer), threads);
}

}  // namespace

LINSTATE_BINDINGS(rwkv) {
    nb::module_& m = to.module;
    m.def("shift",
          [](Size rows, Size n, Size count, const nb::tuple& x, const nb::tuple& mix, const nb::tuple& out, nb::handle before,
             nb::handle after, int threads) {
              ShiftCall call = read_shift(rows, n, count, x, mix, out);
              call.before = address<const float>(before), call.after = address<float>(after);
              nb::gil_scoped_release release;
              run_call(call, threads);
          },
          nb::arg("rows"), nb::arg("n"), nb::arg("count"), nb::arg("x"), nb::arg("mix"), nb::arg("out"),
          nb::arg("before").none(), nb::arg("after"), nb::arg("threads"),
          "One token's shift, for several rates; see linstate/ops/native/rwkv.py.");
    m.def("rwkv7",
          [](Size rows, Size heads, Size size, float eps, const nb::tuple& tensors, const nb::tuple& out, nb::handle before,
             nb::handle after, int threads) {
              Rwkv7Call call = read_rwkv7(rows, heads, size, eps, tensors, out);
              call.before = address<const float>(before), call.after = address<float>(after);
              nb::gil_scoped_release release;
              run_call(call, threads);
          },
          nb::arg("rows"), nb::arg("heads"), nb::arg("size"), nb::arg("eps"), nb::arg("tensors"), nb::arg("out"),
          nb::arg("before").none(), nb::arg("after"), nb::arg("threads"),
          "One token of RWKV-7 between its projections; see linstate/ops/native/rwkv.py.");
    m.def("shift_tokens", &shift_tokens, nb::arg("rows"), nb::arg("tokens"), nb::arg("n"), nb::arg("count"), nb::arg("x"),
          nb::arg("mix"), nb::arg("out"), nb::arg("before").none(), nb::arg("threads"),
          "RWKV's shift of many tokens; see linstate/ops/native/block.py.");
    m.def("rwkv7_gates", &rwkv7_gates, nb::arg("rows"), nb::arg("heads"), nb::arg("size"), nb::arg("tensors"), nb::arg("outs"),
          nb::arg("threads"), "What stands before RWKV-7's recurrence; see linstate/ops/native/block.py.");
    m.def("rwkv7_finish", &rwkv7_finish, nb::arg("rows"), nb::arg("heads"), nb::arg("size"), nb::arg("eps"), nb::arg("tensors"),
          nb::arg("made"), nb::arg("out"), nb::arg("threads"), "What stands behind it; see linstate/ops/native/block.py.");
    to.program.def("shift", [](Program& p, Size rows, Size n, Size count, const nb::tuple& x, const nb::tuple& mix,
                               const nb::tuple& out) { p.append(read_shift(rows, n, count, x, mix, out)); },
                   nb::arg("rows"), nb::arg("n"), nb::arg("count"), nb::arg("x"), nb::arg("mix"), nb::arg("out"));
    to.program.def("rwkv7", [](Program& p, Size rows, Size heads, Size size, float eps, const nb::tuple& tensors,
                               const nb::tuple& out) { p.append(read_rwkv7(rows, heads, size, eps, tensors, out)); },
                   nb::arg("rows"), nb::arg("heads"), nb::arg("size"), nb::arg("eps"), nb::arg("tensors"), nb::arg("out"));
}

}  // namespace linstate
