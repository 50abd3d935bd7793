// RWKV: the shift before the projections and RWKV-7's time mix between them, of one token and of many; csrc/rwkv.hpp, csrc/block.hpp.

#include "bindings.hpp"
#include "block.hpp"

namespace linstate {
namespace {

// x [rows, n], mix [count, n], out [count, rows, n] without gaps.
ShiftCall read_rates(const Check& check, const Tensor& x, const Tensor& mix, const Tensor& out) {
    expect_dims(check, "mix", mix, 2);
    ShiftCall call;
    call.rows = rows_of(x), call.n = x.last(), call.count = mix.size(0);
    call.x = check.rows("x", x, call.rows, call.n), call.mix = check.weight("mix", mix, call.count * call.n);
    const Tensor::Type type = out.narrow() ? Tensor::Type::bf16 : Tensor::Type::f32;
    call.out.data = const_cast<void*>(check.flat("out", out, call.count * call.rows * call.n, type));
    call.out.time = call.rows * call.n, call.out.batch = call.n, call.out.dtype = out.narrow() ? Dtype::bf16 : Dtype::f32;
    return call;
}

ShiftCall read_shift(const Tensor& x, const Tensor& mix, const Tensor& out) { return read_rates(Check("shift"), x, mix, out); }

// All of [rows, heads size] and of [heads size].
Rwkv7Call read_time_mix(const Check& check, Size heads, float eps, const Tensor& r, const Tensor& key, const Tensor& value,
                        const MaybeTensor& decay, const MaybeTensor& rate, const MaybeTensor& value_rate,
                        const MaybeTensor& first_value, const MaybeTensor& gate, const MaybeTensor& k_k, const MaybeTensor& k_a,
                        const MaybeTensor& r_k, const MaybeTensor& weight, const MaybeTensor& bias) {
    Rwkv7Call call;
    const Size rows = rows_of(r), width = r.last();
    check.that(heads > 0 && width > 0 && width % heads == 0, "the channels of r must be a multiple of the heads");
    check.that(value_rate.given == first_value.given, "what mixes the values and the first layer's are there together");
    call.rows = rows, call.heads = heads, call.size = width / heads, call.eps = eps;
    call.r = check.rows("r", r, rows, width), call.key = check.rows("k", key, rows, width), call.value = check.rows("v", value, rows, width);
    call.decay = check.rows("decay", decay, rows, width), call.rate = check.rows("rate", rate, rows, width);
    call.value_rate = check.rows("value_rate", value_rate, rows, width);
    call.first_value = check.rows("first_value", first_value, rows, width), call.gate = check.rows("gate", gate, rows, width);
    call.k_k = check.weight("k_k", k_k, width), call.k_a = check.weight("k_a", k_a, width), call.r_k = check.weight("r_k", r_k, width);
    call.weight = check.weight("weight", weight, width), call.bias = check.weight("bias", bias, width);
    return call;
}

Rwkv7Call read_rwkv7(Size heads, float eps, const Tensor& r, const Tensor& key, const Tensor& value, const Tensor& decay,
                     const Tensor& rate, const MaybeTensor& value_rate, const MaybeTensor& first_value, const Tensor& gate,
                     const Tensor& k_k, const Tensor& k_a, const Tensor& r_k, const Tensor& weight, const MaybeTensor& bias,
                     const Tensor& out) {
    const Check check("rwkv7");
    const auto some = [](const Tensor& t) { return MaybeTensor{t}; };
    Rwkv7Call call = read_time_mix(check, heads, eps, r, key, value, some(decay), some(rate), value_rate, first_value, some(gate),
                                   some(k_k), some(k_a), some(r_k), some(weight), bias);
    call.out = check.rows_out("out", out, call.rows, call.heads * call.size);
    return call;
}

float* floats(const Check& check, const char* name, const Tensor& t, Size numbers) {
    return static_cast<float*>(const_cast<void*>(check.flat(name, t, numbers, Tensor::Type::f32)));
}

}  // namespace

// x of the token before, [rows, n].
constexpr std::size_t states_of(const ShiftCall&) { return 1; }
void place_states(ShiftCall& call, const MaybeTensor* before, const MaybeTensor* after) {
    const Check check("shift");
    check.that(after[0].given, "the state after it is missing");
    call.before = floats(check, "before", before[0], call.rows * call.n);
    call.after = floats(check, "after", after[0], call.rows * call.n);
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

// The matrix [rows, heads, size, size].
constexpr std::size_t states_of(const Rwkv7Call&) { return 1; }
void place_states(Rwkv7Call& call, const MaybeTensor* before, const MaybeTensor* after) {
    const Check check("rwkv7");
    check.that(after[0].given, "the matrix after it is missing");
    const Size numbers = call.rows * call.heads * call.size * call.size;
    call.before = floats(check, "before", before[0], numbers), call.after = floats(check, "after", after[0], numbers);
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

// ------------------------------------------------------------------------------------------------ many tokens

namespace {

// x [B, T, n], before [B, n]
void shift_tokens(const Tensor& x, const Tensor& mix, const MaybeTensor& before, const Tensor& out, int threads) {
    const Check check("shift_tokens");
    expect_dims(check, "x", x, 3);
    ShiftTokens call;
    call.shift = read_rates(check, x, mix, out), call.tokens = x.size(1);
    call.shift.before = floats(check, "before", before, x.size(0) * x.size(2));
    if (call.shift.rows == 0) return;
    nb::gil_scoped_release release;
    const ShiftCall& c = call.shift;
    by_rows(call, LINSTATE_IN_USE(between).shift, c.rows, 0.2 * double(c.n * (c.count + 1)), block_scratch(c), threads);
}

// Rows without gaps.
Output made(const Check& check, const char* name, const Tensor& t, const Rwkv7Call& call) {
    Output o;
    if (!t) return o;
    const Tensor::Type type = t.narrow() ? Tensor::Type::bf16 : Tensor::Type::f32;
    o.data = const_cast<void*>(check.flat(name, t, call.rows * call.heads * call.size, type));
    o.batch = call.heads * call.size, o.dtype = t.narrow() ? Dtype::bf16 : Dtype::f32;
    return o;
}

void rwkv7_gates(Size heads, const Tensor& key, const Tensor& value, const Tensor& decay, const Tensor& rate,
                 const MaybeTensor& value_rate, const MaybeTensor& first_value, const Tensor& k_k, const Tensor& k_a,
                 const Tensor& k_out, const MaybeTensor& v_out, const Tensor& a_out, const Tensor& b_out, const Tensor& g_out,
                 int threads) {
    const Check check("rwkv7_gates");
    check.that(v_out.given == value_rate.given, "values are written where they are mixed");
    Rwkv7Gates call;
    call.mixer = read_time_mix(check, heads, 0.0f, key, key, value, {decay}, {rate}, value_rate, first_value, {}, {k_k}, {k_a}, {}, {}, {});
    const Rwkv7Call& c = call.mixer;
    call.key = made(check, "k_out", k_out, c), call.value = made(check, "v_out", v_out, c);
    call.a = made(check, "a_out", a_out, c), call.b = made(check, "b_out", b_out, c), call.g = made(check, "g_out", g_out, c);
    nb::gil_scoped_release release;
    by_rows(call, LINSTATE_IN_USE(between).rwkv7_gates, c.rows, 1.5 * double(c.heads * c.size), block_scratch(c), threads);
}

// In place: `out` holds what the recurrence made; key and value as they were written.
void rwkv7_finish(Size heads, float eps, const Tensor& r, const Tensor& key, const Tensor& value, const Tensor& gate,
                  const Tensor& r_k, const Tensor& weight, const MaybeTensor& bias, const Tensor& out, int threads) {
    const Check check("rwkv7_finish");
    Rwkv7Finish call;
    call.mixer = read_time_mix(check, heads, eps, r, key, value, {}, {}, {}, {}, {gate}, {}, {}, {r_k}, {weight}, bias);
    call.mixer.out = made(check, "out", out, call.mixer);
    call.made.data = call.mixer.out.data, call.made.batch = call.mixer.out.batch, call.made.dtype = call.mixer.out.dtype;
    nb::gil_scoped_release release;
    const Rwkv7Call& c = call.mixer;
    by_rows(call, LINSTATE_IN_USE(between).rwkv7_finish, c.rows, double(c.heads * c.size), block_scratch(c), threads);
}

}  // namespace

LINSTATE_BINDINGS(rwkv) {
    nb::module_& m = to.module;
    define_with_states(to, "shift", &read_shift, "One token's shift, for several rates; see linstate/ops/native/rwkv.py.", nb::arg("x"),
                       nb::arg("mix"), nb::arg("out"));
    define_with_states(to, "rwkv7", &read_rwkv7, "One token of RWKV-7 between its projections; see linstate/ops/native/rwkv.py.",
                       nb::arg("heads"), nb::arg("eps"), nb::arg("r"), nb::arg("k"), nb::arg("v"), nb::arg("decay"), nb::arg("rate"),
                       nb::arg("value_rate").none(), nb::arg("first_value").none(), nb::arg("gate"), nb::arg("k_k"), nb::arg("k_a"),
                       nb::arg("r_k"), nb::arg("weight"), nb::arg("bias").none(), nb::arg("out"));
    m.def("shift_tokens", &shift_tokens, nb::arg("x"), nb::arg("mix"), nb::arg("before").none(), nb::arg("out"), nb::arg("threads"),
          "RWKV's shift of many tokens; see linstate/ops/native/block.py.");
    m.def("rwkv7_gates", &rwkv7_gates, nb::arg("heads"), nb::arg("k"), nb::arg("v"), nb::arg("decay"), nb::arg("rate"),
          nb::arg("value_rate").none(), nb::arg("first_value").none(), nb::arg("k_k"), nb::arg("k_a"), nb::arg("k_out"),
          nb::arg("v_out").none(), nb::arg("a_out"), nb::arg("b_out"), nb::arg("g_out"), nb::arg("threads"),
          "What stands before RWKV-7's recurrence; see linstate/ops/native/block.py.");
    m.def("rwkv7_finish", &rwkv7_finish, nb::arg("heads"), nb::arg("eps"), nb::arg("r"), nb::arg("k"), nb::arg("v"), nb::arg("gate"),
          nb::arg("r_k"), nb::arg("weight"), nb::arg("bias").none(), nb::arg("out"), nb::arg("threads"),
          "What follows it, in place; see linstate/ops/native/block.py.");
}

}  // namespace linstate
