// What the files of bindings (csrc/bind) share: how a call is bound, and which instruction set's kernels serve it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include "kernels.hpp"
#include "pool.hpp"
#include "program.hpp"
#include "tensor.hpp"

namespace linstate {

const Kernels& kernels_in_use();

// The entry of the instruction set in use, of a table that LINSTATE_EVERY_SET declares.
#if defined(LINSTATE_X86) && defined(LINSTATE_EMULATED)
#define LINSTATE_WIDE(name) wide::name
#else
#define LINSTATE_WIDE(name) portable::name
#endif
#if defined(LINSTATE_X86)
#define LINSTATE_IN_USE(name)                                    \
    (kernels_in_use().set == Set::avx512 ? avx512::name          \
     : kernels_in_use().set == Set::avx2 ? avx2::name            \
     : kernels_in_use().set == Set::wide ? LINSTATE_WIDE(name)   \
                                         : portable::name)
#else
#define LINSTATE_IN_USE(name) portable::name
#endif

// What is bound: functions of the module, and methods of a program, which repeats calls.
struct Bindings {
    nb::module_& module;
    nb::class_<Program>& program;
};

// A file of bindings enters itself: `LINSTATE_BINDINGS(norm) { define(...); }`, with `Bindings& to`.
struct Registered {
    using Bind = void (*)(Bindings&);

    const char* name;
    Bind bind;

    Registered(const char* name, Bind bind);
    static std::vector<Registered>& all();
};
#define LINSTATE_BINDINGS(name)                              \
    static void bind_##name(Bindings& to);                          \
    static const Registered registered_##name{#name, &bind_##name}; \
    static void bind_##name(Bindings& to)

// Binds a call twice: as a function of the module that runs at once, and as a method of a program that keeps it.
// `read` makes a call of checked arguments; `run_call(call, threads)` does the work. `extra`: nb::arg of every argument of `read`.
template <class Call, class... Args, class... Extra>
void define(Bindings& to, const char* name, Call (*read)(Args...), const char* doc, const Extra&... extra) {
    to.module.def(
        name,
        [read](Args... args, int threads) {
            const Call call = read(args...);
            nb::gil_scoped_release release;
            run_call(call, threads);
        },
        extra..., nb::arg("threads"), doc);
    to.program.def(name, [read](Program& program, Args... args) { program.append(read(args...)); }, extra...);
}

// The same of calls with states, which `place_states(call, before, after)` checks and enters: each before, then each after.
template <class Call, class... Args, class... Extra>
void define_with_states(Bindings& to, const char* name, Call (*read)(Args...), const char* doc, const Extra&... extra) {
    to.module.def(
        name,
        [read](Args... args, const std::vector<MaybeTensor>& before, const std::vector<MaybeTensor>& after, int threads) {
            Call call = read(args...);
            if (before.size() != states_of(call) || after.size() != states_of(call))
                throw ArgumentError("a call needs all its states before and after it");
            place_states(call, before.data(), after.data());
            nb::gil_scoped_release release;
            run_call(call, threads);
        },
        extra..., nb::arg("before"), nb::arg("after"), nb::arg("threads"), doc);
    to.program.def(name, [read](Program& program, Args... args) { program.append(read(args...)); }, extra...);
}

// Tasks of whole heads, or of `width` columns of one.
void run_matrix(const MatrixCall& call, const MatrixKernel& kernel, Size width, int threads);

// Cosines and sines of rotary embedding, [rows, turned], in `turn`. Angles in double: float is off by 0.03 at a million tokens.
const float* angles(std::vector<float>& turn, const Size* position, Size rows, Size turned, double base);

// How many threads so much work is worth (in nanoseconds, about): one for every 50 microseconds, as one that sleeps wakes up in 20.
inline int worth(double work, int threads) {
    const double wanted = work / 50e3 + 1;
    return wanted < threads ? int(wanted) : threads;
}

// The same for threads that are there and awake, as within a program: one for every 5 microseconds.
inline int worth_calling(double work, int threads) {
    const double wanted = work / 5e3 + 1;
    return wanted < threads ? int(wanted) : threads;
}

// Rows [first, last) of a call in tasks of some. `nanoseconds`: of a row, about.
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

}  // namespace linstate
