// linstate._native: what is not a kernel's own; those bind themselves (csrc/bind). Tensors come through DLPack and are checked by
// tensor.hpp, so that the module links against nothing but the C and C++ runtime and serves every torch.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
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

// One call of the matmul core that serves bf16 or float32 inputs; for its tests. Matrices of float32 with dense rows.
struct Matrix {
    Size rows, columns, stride;
    const float* data;
};
Matrix matrix_of(const Check& check, const char* name, const Tensor& t) {
    expect_dims(check, name, t, 2);
    const Sequence s = check.rows(name, t, t.size(0), t.size(1));
    check.that(s.dtype == Dtype::f32, "matrices are float32");
    return {t.size(0), t.size(1), s.batch, static_cast<const float*>(s.data)};
}
void core(bool bf16, bool solve, const Tensor& a, const MaybeTensor& b, const Tensor& c, bool keep, const MaybeTensor& row_scale,
          int shape) {
    const Check check("core");
    const Matrix left = matrix_of(check, "a", a), out = matrix_of(check, "c", c);
    check.that(b.given != solve, "a product has two factors, a system one");
    GemmCall call;
    call.m = out.rows, call.n = out.columns, call.k = left.columns;
    call.a = left.data, call.lda = left.stride, call.c = const_cast<float*>(out.data), call.ldc = out.stride;
    check.that(left.rows >= call.m, "a must have the rows of c");
    if (b) {
        const Matrix right = matrix_of(check, "b", b);
        check.that(right.rows >= call.k && right.columns >= call.n, "b must have the columns of a and c");
        call.b = right.data, call.ldb = right.stride;
    } else {
        check.that(left.columns >= call.m, "a system's matrix is square");
    }
    call.room = std::max({call.m, call.n, call.k});
    call.keep = keep, call.row_scale = check.floats("row_scale", row_scale, {call.m}), call.shape = shape;
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

std::vector<Registered>& Registered::all() {
    static std::vector<Registered> files;
    return files;
}
Registered::Registered(const char* given, Bind bound) : name(given), bind(bound) { all().push_back(*this); }

}  // namespace linstate

NB_MODULE(_native, m) {
    using namespace linstate;
    m.doc() = "Linstate's compiled part. Use linstate.ops.native, which also serves where this is absent.";
    m.def("version", []() { return LINSTATE_VERSION; }, "The version of Linstate that this module was built from.");
    m.def("cpu_features", &cpu_features, nb::sig("def cpu_features() -> dict[str, bool]"),
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
    nb::register_exception_translator([](const std::exception_ptr& error, void*) {
        try {
            std::rethrow_exception(error);
        } catch (const ArgumentError& e) {
            nb::object type = nb::module_::import_("linstate.errors").attr("ArgumentError");
            PyErr_SetString(type.ptr(), e.what());
        }
    });
    nb::class_<Program> program(m, "Program", "Native calls to repeat; see linstate/ops/native/program.py.");
    Bindings to{m, program};
    // By name: linkers put files in any order, and the stub is the same everywhere.
    std::sort(Registered::all().begin(), Registered::all().end(),
              [](const Registered& a, const Registered& b) { return std::string_view(a.name) < b.name; });
    for (const Registered& file : Registered::all()) file.bind(to);
    m.def("core", &core, nb::arg("bf16"), nb::arg("solve"), nb::arg("a"), nb::arg("b").none(), nb::arg("c"),
          nb::arg("keep"), nb::arg("row_scale").none(), nb::arg("shape"),
          "A matmul core of the instruction set in use, for tests/ops/test_native_tiles.py.");
}
