// Several calls of native kernels as one: what a decoded token needs of a layer, or of all of them. See module.cpp.

#include <stdexcept>
#include <type_traits>
#include <variant>
#include <vector>

#include <nanobind/stl/vector.h>

#include "bindings.hpp"

namespace linstate {
namespace {

// Buffers stand where they stood when the calls were recorded (linstate/ops/native_program.py keeps them); only states come and
// go: four addresses for each mixer, in the order of the calls.
class Program {
    std::vector<std::variant<LinearCall, NormCall, GatedCall, AddCall, MixerCall>> calls_;
    std::size_t mixers_ = 0;

   public:
    template <class Call>
    void append(const Call& call) {
        if constexpr (std::is_same_v<Call, MixerCall>) ++mixers_;
        calls_.emplace_back(call);
    }

    // states: (tail_before, tail_after, before, after) of each mixer; 0 is none
    void run(const std::vector<std::uintptr_t>& states, int threads) {
        if (states.size() != 4 * mixers_) throw std::invalid_argument("a program needs four addresses for each mixer");
        std::size_t at = 0;
        for (auto& call : calls_) {
            if (auto* mixer = std::get_if<MixerCall>(&call)) {
                mixer->tail_before = reinterpret_cast<const float*>(states[at]);
                mixer->tail_after = reinterpret_cast<float*>(states[at + 1]);
                mixer->before = reinterpret_cast<const float*>(states[at + 2]);
                mixer->after = reinterpret_cast<float*>(states[at + 3]);
                at += 4;
            }
            std::visit([&](const auto& one) { run_call(one, threads); }, call);
        }
    }
};

}  // namespace

void bind_program(nb::module_& m) {
    nb::class_<Program>(m, "Program", "Native calls to repeat; see linstate/ops/native_program.py.")
        .def(nb::init<>())
        .def("linear",
             [](Program& p, int format, Size rows, Size n, Size k, const nb::tuple& x, nb::handle weight, nb::handle scales,
                nb::handle bias, const nb::tuple& out) {
                 p.append(read_linear(format, rows, n, k, x, weight, scales, bias, out));
             },
             nb::arg("format"), nb::arg("rows"), nb::arg("n"), nb::arg("k"), nb::arg("x"), nb::arg("weight"),
             nb::arg("scales").none(), nb::arg("bias").none(), nb::arg("out"))
        .def("norm",
             [](Program& p, Size rows, Size groups, Size size, bool centre, float eps, const nb::tuple& x, nb::handle weight,
                float weight_plus, nb::handle bias, int gate, nb::handle z, const nb::tuple& out) {
                 p.append(read_norm(rows, groups, size, centre, eps, x, weight, weight_plus, bias, gate, z, out));
             },
             nb::arg("rows"), nb::arg("groups"), nb::arg("size"), nb::arg("centre"), nb::arg("eps"), nb::arg("x"),
             nb::arg("weight").none(), nb::arg("weight_plus"), nb::arg("bias").none(), nb::arg("gate"), nb::arg("z").none(),
             nb::arg("out"))
        .def("gated", [](Program& p, Size rows, Size n, const nb::tuple& x,
                         nb::handle out) { p.append(read_gated(rows, n, x, out)); })
        .def("add", [](Program& p, Size n, std::uintptr_t x, std::uintptr_t y) {
            p.append(AddCall{n, reinterpret_cast<std::uint16_t*>(x), reinterpret_cast<const std::uint16_t*>(y)});
        })
        .def("mixer", [](Program& p, const nb::tuple& sizes, const nb::tuple& numbers, Size rows, const nb::tuple& tensors,
                         nb::handle out) { p.append(read_mixer(sizes, numbers, rows, tensors, out)); })
        .def("run", &Program::run, nb::arg("states"), nb::arg("threads"), nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace linstate
