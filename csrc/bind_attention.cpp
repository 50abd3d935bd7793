// The binding of softmax attention; see module.cpp.

#include "bindings.hpp"
#include "pool.hpp"

namespace linstate {
namespace {

// sizes: rows, tokens, past, key heads, heads of one key head, K, V, window (0: none)
void attention(const nb::tuple& sizes, float scale, const nb::tuple& tensors, nb::handle first, nb::handle out, int threads) {
    AttentionCall call;
    call.rows = nb::cast<Size>(sizes[0]), call.tokens = nb::cast<Size>(sizes[1]), call.past = nb::cast<Size>(sizes[2]);
    call.hk = nb::cast<Size>(sizes[3]), call.groups = nb::cast<Size>(sizes[4]);
    call.k = nb::cast<Size>(sizes[5]), call.v = nb::cast<Size>(sizes[6]), call.window = nb::cast<Size>(sizes[7]);
    call.q = sequence(tensors[0]), call.key = sequence(tensors[1]), call.value = sequence(tensors[2]);
    call.first = address<const Size>(first), call.scale = scale;
    const Sequence o = sequence(out);
    call.out = {const_cast<void*>(o.data), o.batch, o.time, o.head, o.dtype};
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

void bind_attention(nb::module_& m) {
    m.def("attention", &attention, nb::arg("sizes"), nb::arg("scale"), nb::arg("tensors"), nb::arg("first"), nb::arg("out"),
          nb::arg("threads"), "Softmax attention over keys that lie in one tensor; see linstate/ops/native/attention.py.");
}

}  // namespace linstate
