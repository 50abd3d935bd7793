// The binding of softmax attention of one token; see module.cpp.

#include <string_view>

#include "row_attention.hpp"
#include "bindings.hpp"
#include "pool.hpp"

namespace linstate {

RowAttentionCall read_row_attention(const nb::tuple& sizes, const nb::tuple& tensors, const nb::tuple& strides, bool narrow,
                                    float scale, std::uintptr_t rows, Size most, nb::handle out) {
    RowAttentionCall call;
    call.rows = nb::cast<Size>(sizes[0]), call.hq = nb::cast<Size>(sizes[1]), call.hk = nb::cast<Size>(sizes[2]);
    call.k = nb::cast<Size>(sizes[3]), call.v = nb::cast<Size>(sizes[4]);
    call.q = sequence(tensors[0]), call.key = sequence(tensors[1]), call.value = sequence(tensors[2]);
    call.key_place = nb::cast<Size>(strides[0]), call.key_head = nb::cast<Size>(strides[1]);
    call.value_place = nb::cast<Size>(strides[2]), call.value_head = nb::cast<Size>(strides[3]);
    call.dtype = narrow ? Dtype::bf16 : Dtype::f32;
    call.row = reinterpret_cast<const RowPlaces*>(rows), call.most = most;
    call.scale = scale;
    const Sequence o = sequence(out);
    call.out = {const_cast<void*>(o.data), o.batch, o.time, o.head, o.dtype};
    return call;
}

namespace {

// Of the instruction set in use (`_native.use`), by its name.
const RowAttentionKernels& kernels_of_isa() {
    [[maybe_unused]] const std::string_view isa = kernels_in_use().isa;
#if defined(LINSTATE_X86)
    if (isa == "amx" || isa == "avx512") return avx512::row_attention;
    if (isa == "avx2") return avx2::row_attention;
#if defined(LINSTATE_EMULATED)
    if (isa != "portable") return wide::row_attention;
#endif
#endif
    return portable::row_attention;
}

}  // namespace

void run_call(const RowAttentionCall& call, int threads) {
    struct Work {
        const RowAttentionCall* call;
        void (*run)(const RowAttentionCall&, Size, Size, void*);
    } const job{&call, kernels_of_isa().run};
    double places = 0;
    for (Size i = 0; i < call.rows; ++i) places += double(call.row[i].places + call.row[i].moved + 1);
    const double work = 0.2 * places * double(call.hk) * double(call.k + call.v);
    pool_tasks(call.rows * call.hk, worth(work, threads), row_attention_scratch(call), &job,
               [](const void* context, Size task, void* scratch) {
                   const Work& w = *static_cast<const Work*>(context);
                   w.run(*w.call, task / w.call->hk, task % w.call->hk, scratch);
               });
}

void bind_row_attention(nb::module_& m) {
    m.def(
        "attend_rows",
        [](const nb::tuple& sizes, const nb::tuple& tensors, const nb::tuple& strides, bool narrow, float scale,
           std::uintptr_t rows, Size most, nb::handle out, int threads) {
            const RowAttentionCall call = read_row_attention(sizes, tensors, strides, narrow, scale, rows, most, out);
            nb::gil_scoped_release release;
            run_call(call, threads);
        },
        nb::arg("sizes"), nb::arg("tensors"), nb::arg("strides"), nb::arg("narrow"), nb::arg("scale"), nb::arg("rows"),
        nb::arg("most"), nb::arg("out"), nb::arg("threads"),
        "Softmax attention of one token; see linstate/ops/native/row_attention.py.");
}

}  // namespace linstate
