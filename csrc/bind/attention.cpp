// Softmax attention of many tokens over keys in one tensor: csrc/attention.hpp, linstate/ops/native/attention.py.

#include "bindings.hpp"

namespace linstate {
namespace {

// q [B, T, Hq, K], the last T of the tokens of keys [B, S + T, Hk, K] and values; first [B]: the first key that counts. window: how many
// keys a token sees, 0 for all.
void attention(const Tensor& q, const Tensor& keys, const Tensor& values, const Tensor& first, Size window, float scale,
               const Tensor& out, int threads) {
    const Check check("attention");
    expect_dims(check, "q", q, 4), expect_dims(check, "keys", keys, 4), expect_dims(check, "values", values, 4);
    AttentionCall call;
    call.rows = q.size(0), call.tokens = q.size(1), call.past = keys.size(1) - q.size(1), call.hk = keys.size(2);
    call.k = q.size(3), call.v = values.size(3), call.window = window, call.scale = scale;
    check.that(call.past >= 0 && window >= 0, "there must be a key for every token");
    check.that(call.hk > 0 && q.size(2) > 0 && q.size(2) % call.hk == 0, "the heads of q must be a multiple of those of keys");
    check.that(call.k <= 256 && call.v <= 256, "K and V go up to 256");
    call.groups = q.size(2) / call.hk;
    call.q = check.sequence("q", q, {call.rows, call.tokens, q.size(2), call.k});
    call.key = check.sequence("keys", keys, {call.rows, keys.size(1), call.hk, call.k});
    call.value = check.sequence("values", values, {call.rows, keys.size(1), call.hk, call.v});
    check.that(call.q.dtype == call.key.dtype && call.q.dtype == call.value.dtype, "q, keys and values must have one dtype");
    call.first = check.integers("first", first, {call.rows});
    for (Size row = 0; row < call.rows; ++row)
        check.that(call.first[row] >= 0 && call.first[row] <= call.past, "the first key that counts must be one of those before");
    call.out = check.output("out", out, {call.rows, call.tokens, q.size(2), call.v});
    const Kernels& table = kernels_in_use();
    nb::gil_scoped_release release;
    struct Work {
        const AttentionCall* call;
        const AttentionKernel* kernel;
        Size tiles;
    } const work{&call, call.q.dtype == Dtype::bf16 ? &table.attention_bf16 : &table.attention,
                 (call.tokens + call.tile() - 1) / call.tile()};
    const double products = double(call.rows * call.hk * call.groups * call.tokens) * double(call.past + call.tokens);
    pool_tasks(call.rows * call.hk * work.tiles, worth(products * double(call.k + call.v) / 100, threads),
               work.kernel->scratch(call), &work, [](const void* context, Size number, void* scratch) {
                   const Work& w = *static_cast<const Work*>(context);
                   const AttentionCall& c = *w.call;
                   AttentionTask task;
                   task.from = number % w.tiles * c.tile();
                   task.to = task.from + c.tile() < c.tokens ? task.from + c.tile() : c.tokens;
                   task.key_head = number / w.tiles % c.hk, task.row = number / w.tiles / c.hk;
                   w.kernel->run(c, task, scratch);
               });
}

}  // namespace

LINSTATE_BINDINGS(attention) {
    to.module.def("attention", &attention, nb::arg("q"), nb::arg("keys"), nb::arg("values"), nb::arg("first"), nb::arg("window"),
                  nb::arg("scale"), nb::arg("out"), nb::arg("threads"),
                  "Softmax attention over keys that lie in one tensor; see linstate/ops/native/attention.py.");
}

}  // namespace linstate
