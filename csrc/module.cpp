// linstate._native: the bindings. Shapes, types and overlaps were checked in Python (linstate/ops/native*.py); here tensors
// are addresses and strides, so that the module links against nothing but the C and C++ runtime and serves every torch.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings.hpp"
#include "cpu.hpp"
#include "pool.hpp"

#ifndef LINSTATE_VERSION
#error "LINSTATE_VERSION must be defined by the build"
#endif

namespace nb = nanobind;

namespace linstate {
namespace {

#if defined(LINSTATE_X86)
// The table of an instruction set that differs from another one in its matmul core for bf16 inputs.
[[maybe_unused]] Kernels on(const Bf16Kernels& bf16, Kernels table, const char* isa) {
    table.isa = isa;
    table.linear_attention_bf16 = bf16.linear_attention;
    table.delta_rule_bf16 = bf16.delta_rule;
    table.dplr_bf16 = bf16.dplr;
    table.core_bf16 = bf16.core;
    table.attention_bf16 = bf16.attention;
    return table;
}
#endif

// Every instruction set that was built and that this machine has, the best first.
std::vector<const Kernels*> usable() {
    std::vector<const Kernels*> found;
#if defined(LINSTATE_X86)
    const CpuFeatures f = detect();
    if (f.avx512 && f.fma) {
#if defined(LINSTATE_AMX)
        static const Kernels amx = on(amx::tiles, avx512::kernels, "amx");
        if (f.avx512_bf16 && f.amx_bf16 && allow_tiles()) found.push_back(&amx);
#endif
#if defined(LINSTATE_AVX512_BF16)
        static const Kernels with_bf16 = on(avx512_bf16::dots, avx512::kernels, "avx512");
        found.push_back(f.avx512_bf16 ? &with_bf16 : &avx512::kernels);
#else
        found.push_back(&avx512::kernels);
#endif
    }
    if (f.avx2 && f.fma) found.push_back(&avx2::kernels);
#endif
    found.push_back(&portable::kernels);
    return found;
}

// For tests of what this machine lacks: never chosen but by name.
std::vector<const Kernels*> emulated() {
    std::vector<const Kernels*> found;
#if defined(LINSTATE_EMULATED)
    static const Kernels tiles = on(emulated::tiles, wide::kernels, "emulated-amx");
    static const Kernels dots = on(emulated::dots, wide::kernels, "emulated-avx512");
    const CpuFeatures f = detect();
    if (f.avx2 && f.fma) found = {&tiles, &dots, &wide::kernels};
#endif
    return found;
}

std::atomic<const Kernels*>& current() {
    static std::atomic<const Kernels*> kernels{usable().front()};
    return kernels;
}

std::vector<std::string> isas(bool with_emulated) {
    std::vector<std::string> names;
    for (const Kernels* k : usable()) names.emplace_back(k->isa);
    if (with_emulated)
        for (const Kernels* k : emulated()) names.emplace_back(k->isa);
    return names;
}

void use(const std::string& name) {
    for (const auto& tables : {usable(), emulated()})
        for (const Kernels* k : tables)
            if (name == k->isa) {
                current() = k;
                return;
            }
    throw std::invalid_argument("instruction set '" + name + "' is not on this machine");
}

// Unit keys of few channels are far from orthogonal, and with beta up to 2 the triangular systems of a chunk then amplify
// roundings of their coefficients beyond the 1e-2 that is promised for bf16 (docs/kernels-tiles.md). Below this K the two
// recurrences that solve such systems compute in float32 for bf16 inputs too; little of a tile would be used there anyway.
constexpr Size kLeastKeyOfRoundedSolve = 64;

// kind: 0 linear attention, 1 delta rule, 2 diagonal plus low rank
void matrix(int kind, nb::tuple sizes, nb::tuple tensors, int gate, float scale, nb::object bounds, nb::object bonus,
            nb::object before, nb::object after, nb::object out, nb::object snapshots, Size every, Size snapshot_count,
            int threads) {
    MatrixCall call;
    call.rows = nb::cast<Size>(sizes[0]), call.tokens = nb::cast<Size>(sizes[1]);
    call.hk = nb::cast<Size>(sizes[2]), call.hv = nb::cast<Size>(sizes[3]), call.hg = nb::cast<Size>(sizes[4]);
    call.k = nb::cast<Size>(sizes[5]), call.v = nb::cast<Size>(sizes[6]);
    call.q = sequence(tensors[0]), call.key = sequence(tensors[1]), call.value = sequence(tensors[2]);
    call.a = sequence(tensors[3]), call.b = sequence(tensors[4]);
    call.beta = sequence(tensors[5]), call.g = sequence(tensors[6]);
    call.gate = static_cast<Gate>(gate);
    call.scale = scale;
    call.bounds = address<const Size>(bounds);
    call.bonus = address<const float>(bonus), call.before = address<const float>(before);
    call.after = address<float>(after);
    const Sequence o = sequence(out);
    call.out = {const_cast<void*>(o.data), o.batch, o.time, o.head, o.dtype};
    call.snapshots = address<float>(snapshots), call.every = every, call.snapshot_count = snapshot_count;

    const Kernels& table = *current().load();
    const bool bf16 = call.value.dtype == Dtype::bf16 && (kind == 0 || call.k >= kLeastKeyOfRoundedSolve);
    const MatrixKernel kernel = kind == 0   ? (bf16 ? table.linear_attention_bf16 : table.linear_attention)
                                : kind == 1 ? (bf16 ? table.delta_rule_bf16 : table.delta_rule)
                                            : (bf16 ? table.dplr_bf16 : table.dplr);
    nb::gil_scoped_release release;
    const Size heads = call.rows * call.hv;
    // A thread is worth making for about a million operations; the state alone counts as a chunk's.
    const double work = double(call.bounds ? call.tokens : call.tokens * call.rows) * double(call.hv) * double(call.k * call.v) * 8;
    const Size worth = Size(work / 1e6) + 1;
    const Size wanted = worth < threads ? worth : threads;
    Size width = call.v;
    if (heads > 0 && heads < wanted) {
        const Size steps = (call.v + table.column_step - 1) / table.column_step;
        Size splits = (wanted + heads - 1) / heads;
        if (splits > steps) splits = steps;
        if (splits > 0) width = (steps + splits - 1) / splits * table.column_step;
    }
    run_matrix(call, kernel, width, int(wanted));
}

// One call of the matmul core that serves bf16 or float32 inputs; for its tests. Addresses of dense-enough float32.
void core(bool bf16, bool solve, nb::tuple sizes, nb::tuple a, nb::handle b, nb::tuple c, bool keep, nb::handle row_scale,
          int shape) {
    GemmCall call;
    call.m = nb::cast<Size>(sizes[0]), call.n = nb::cast<Size>(sizes[1]), call.k = nb::cast<Size>(sizes[2]);
    call.room = std::max({call.m, call.n, call.k});
    call.a = address<const float>(a[0]), call.lda = nb::cast<Size>(a[1]);
    if (!b.is_none()) {
        const nb::tuple right = nb::cast<nb::tuple>(b);
        call.b = address<const float>(right[0]), call.ldb = nb::cast<Size>(right[1]);
    }
    call.c = address<float>(c[0]), call.ldc = nb::cast<Size>(c[1]);
    call.keep = keep, call.row_scale = address<const float>(row_scale), call.shape = shape;
    const Kernels& table = *current().load();
    const MatmulCore& one = bf16 ? table.core_bf16 : table.core;
    struct Work {
        const GemmCall* call;
        void (*run)(const GemmCall&, void*);
    } const work{&call, solve ? one.solve : one.gemm};
    pool_tasks(1, 1, one.scratch(call.room, call.room), &work, [](const void* context, Size, void* scratch) {
        const Work& w = *static_cast<const Work*>(context);
        w.run(*w.call, scratch);
    });
}

nb::dict cpu_features() {
    const CpuFeatures f = detect();
    nb::dict d;
    d["amx_bf16"] = f.amx_bf16;
    d["avx512_bf16"] = f.avx512_bf16;
    d["avx512f"] = f.avx512f;
    d["avx2"] = f.avx2;
    d["fma"] = f.fma;
    d["neon"] = f.neon;
    return d;
}

}  // namespace

const Kernels& kernels_in_use() { return *current().load(); }

}  // namespace linstate

NB_MODULE(_native, m) {
    using namespace linstate;
    m.doc() = "Linstate's compiled part. Use linstate.ops.native, which also serves where this is absent.";
    m.def("version", []() { return LINSTATE_VERSION; }, "The version of Linstate that this module was built from.");
    m.def("cpu_features", &cpu_features,
          "Instruction sets that the processor has and the operating system supports, by name.");
    m.def("isas", &isas, nb::arg("emulated") = false,
          "The instruction sets with kernels that this machine can run, the best first; then those emulated for tests.");
    m.def("isa", []() { return std::string(current().load()->isa); }, "The instruction set in use.");
    m.def("use", &use, nb::arg("isa"), "Use the kernels of one instruction set from now on, in every thread.");
    m.def("join_team",
          [](std::uintptr_t parallel, std::uintptr_t thread_number, std::uintptr_t most_threads) {
              join_team({reinterpret_cast<decltype(Team::parallel)>(parallel),
                         reinterpret_cast<decltype(Team::thread_number)>(thread_number),
                         reinterpret_cast<decltype(Team::most_threads)>(most_threads)});
          },
          nb::arg("parallel"), nb::arg("thread_number"), nb::arg("most_threads"),
          "Run on the threads of an OpenMP library (pool.hpp): addresses of its functions, 0 for threads of our own.");
    m.def("matrix", &matrix, nb::arg("kind"), nb::arg("sizes"), nb::arg("tensors"), nb::arg("gate"), nb::arg("scale"),
          nb::arg("bounds").none(), nb::arg("bonus").none(), nb::arg("before").none(), nb::arg("after"), nb::arg("out"),
          nb::arg("snapshots").none(), nb::arg("every"), nb::arg("snapshot_count"), nb::arg("threads"),
          "A chunked recurrence on a matrix state; see linstate/ops/native/matrix.py.");
    bind_token(m);
    bind_attend(m);
    bind_block(m);
    bind_attention(m);
    bind_layers(m);
    bind_memory(m);
    bind_program(m);
    bind_rwkv(m);
    bind_row_attention(m);
    m.def("core", &core, nb::arg("bf16"), nb::arg("solve"), nb::arg("sizes"), nb::arg("a"), nb::arg("b").none(), nb::arg("c"),
          nb::arg("keep"), nb::arg("row_scale").none(), nb::arg("shape"),
          "A matmul core of the instruction set in use, for tests/ops/test_native_tiles.py.");
}
