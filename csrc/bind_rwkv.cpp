// The bindings of RWKV's token; see module.cpp.

#include "bindings.hpp"
#include "pool.hpp"

namespace linstate {

// x, mix: (address, row stride, is bf16); out: (address, stride of rates, is bf16), rows without gaps.
ShiftCall read_shift(Size rows, Size n, Size count, const nb::tuple& x, const nb::tuple& mix, const nb::tuple& out) {
    ShiftCall call;
    call.rows = rows, call.n = n, call.count = count;
    call.x = rows_of(x), call.mix = rows_of(mix);
    const Sequence o = rows_of(out);
    call.out.data = const_cast<void*>(o.data), call.out.time = o.batch, call.out.batch = n, call.out.dtype = o.dtype;
    return call;
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

// `tensors` in the order of linstate/ops/native/rwkv.py.
Rwkv7Call read_rwkv7(Size rows, Size heads, Size size, float eps, const nb::tuple& tensors, nb::handle out) {
    Rwkv7Call call;
    call.rows = rows, call.heads = heads, call.size = size, call.eps = eps;
    std::size_t i = 0;
    const auto tensor = [&] { return rows_of(tensors[i++]); };
    call.r = tensor(), call.key = tensor(), call.value = tensor(), call.decay = tensor(), call.rate = tensor();
    call.value_rate = tensor(), call.first_value = tensor(), call.gate = tensor();
    call.k_k = tensor(), call.k_a = tensor(), call.r_k = tensor(), call.weight = tensor(), call.bias = tensor();
    const Sequence o = rows_of(out);
    call.out.data = const_cast<void*>(o.data), call.out.batch = o.batch, call.out.dtype = o.dtype;
    return call;
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

void bind_rwkv(nb::module_& m) {
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
}

}  // namespace linstate
