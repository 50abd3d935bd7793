// Several calls of native kernels as one: what a decoded token needs of a layer, or of all of them. See module.cpp.

#include <stdexcept>
#include <type_traits>
#include <variant>
#include <vector>

#include <nanobind/stl/vector.h>

#include "bindings.hpp"

namespace linstate {
namespace {

// Buffers stand where they stood when the calls were recorded (linstate/ops/native/program.py keeps them); only states come and
// go: some addresses for each call that has one, in the order of the calls. Neighbouring products that need nothing of each other
// are one call.
class Program {
    std::vector<std::variant<AttendToken, EmbedCall, LinearGroup, NormCall, GatedCall, AddCall, ActivationCall, MixerCall, ShiftCall, Rwkv7Call>> calls_;
    std::size_t states_ = 0;

    // Addresses of a call's states.
    template <class Call>
    static constexpr std::size_t states_of() {
        if constexpr (std::is_same_v<Call, AttendToken>) return 9;
        return requires(Call call) { call.after; } ? 4 : 0;
    }

   public:
    template <class Call>
    void append(const Call& call) {
        states_ += states_of<Call>();
        if constexpr (std::is_same_v<Call, LinearCall>) {
            if (!calls_.empty())
                if (auto* group = std::get_if<LinearGroup>(&calls_.back()))
                    if (group->join(call)) return;
            calls_.emplace_back(LinearGroup{{call}});
            return;
        } else {
            calls_.emplace_back(call);
        }
    }

    std::size_t size() const { return calls_.size(); }

    // states: (tail_before, tail_after, before, after) of each call with a state, or what place_states reads; 0 is none. The first `count` calls are run;
    // past: the states are written past the caches.
    void run(const std::vector<std::uintptr_t>& states, std::size_t count, bool past, int threads) {
        if (states.size() != states_) throw std::invalid_argument("a program needs the addresses of all its states");
        if (count > calls_.size()) throw std::invalid_argument("a program has not so many calls");
        const std::uintptr_t* at = states.data();
        for (std::size_t i = 0; i < count; ++i)
            std::visit(
                [&](auto& call) {
                    using Call = std::remove_reference_t<decltype(call)>;
                    if constexpr (std::is_same_v<Call, MixerCall>) {
                        call.tail_before = reinterpret_cast<const float*>(at[0]);
                        call.tail_after = reinterpret_cast<float*>(at[1]);
                    }
                    if constexpr (std::is_same_v<Call, AttendToken>) {
                        place_states(call, at);
                    } else if constexpr (states_of<Call>() > 0) {
                        call.before = reinterpret_cast<const float*>(at[2]);
                        call.after = reinterpret_cast<float*>(at[3]);
                    }
                    at += states_of<Call>();
                    if constexpr (requires { call.past; }) call.past = past;
                    run_call(call, threads);
                },
                calls_[i]);
    }
};

}  // namespace

void bind_program(nb::module_& m) {
    nb::class_<Program>(m, "Program", "Native calls to repeat; see linstate/ops/native/program.py.")
        .def(nb::init<>())
        .def("attend", [](Program& p, const nb::tuple& sizes, const nb::tuple& numbers, const nb::tuple& tensors,
                          nb::handle out) { p.append(read_attend(sizes, numbers, tensors, out)); })
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
        .def("add",
             [](Program& p, Size n, nb::handle x, nb::handle y, nb::handle read, bool fresh) {
                 p.append(AddCall{n, address<void>(x), address<const std::uint16_t>(y), address<std::uint16_t>(read), fresh});
             },
             nb::arg("n"), nb::arg("x"), nb::arg("y"), nb::arg("read").none(), nb::arg("fresh"))
        .def("activate", [](Program& p, int kind, Size n, nb::handle x,
                            nb::handle out) { p.append(read_activation(kind, n, x, out)); })
        .def("shift", [](Program& p, Size rows, Size n, Size count, const nb::tuple& x, const nb::tuple& mix,
                         const nb::tuple& out) { p.append(read_shift(rows, n, count, x, mix, out)); })
        .def("rwkv7", [](Program& p, Size rows, Size heads, Size size, float eps, const nb::tuple& tensors,
                         const nb::tuple& out) { p.append(read_rwkv7(rows, heads, size, eps, tensors, out)); })
        .def("mixer", [](Program& p, const nb::tuple& sizes, const nb::tuple& numbers, Size rows, const nb::tuple& tensors,
                         nb::handle out) { p.append(read_mixer(sizes, numbers, rows, tensors, out)); })
        .def("embed", [](Program& p, int format, Size rows, Size n, Size k, nb::handle ids, nb::handle weight, nb::handle scales,
                         nb::handle out) { p.append(read_embed(format, rows, n, k, ids, weight, scales, out)); },
             nb::arg("format"), nb::arg("rows"), nb::arg("n"), nb::arg("k"), nb::arg("ids"), nb::arg("weight"), nb::arg("scales").none(),
             nb::arg("out"))
        .def_prop_ro("size", &Program::size)
        .def("run", &Program::run, nb::arg("states"), nb::arg("count"), nb::arg("past"), nb::arg("threads"), nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace linstate
