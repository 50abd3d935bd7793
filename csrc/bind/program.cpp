// See program.hpp; every call of csrc/bind that `define` binds is a method of a program, too.

#include "bindings.hpp"

namespace linstate {

void Program::run(const std::vector<MaybeTensor>& before, const std::vector<MaybeTensor>& after, std::size_t count, bool past,
                  int threads) {
    if (before.size() != states_ || after.size() != states_)
        throw ArgumentError("a program needs all its states, before and after; got " + std::to_string(before.size()) + " and " +
                            std::to_string(after.size()) + " of " + std::to_string(states_));
    if (count > calls_.size()) throw ArgumentError("a program has not so many calls");
    std::size_t at = 0;
    for (const auto& call : calls_) {
        call->place(before.data() + at, after.data() + at);
        at += call->states();
    }
    nb::gil_scoped_release release;
    for (std::size_t i = 0; i < count; ++i) calls_[i]->run(past, threads);
}

LINSTATE_BINDINGS(program) {
    to.program.def(nb::init<>())
        .def_prop_ro("size", &Program::size)
        .def("run", &Program::run, nb::arg("before"), nb::arg("after"), nb::arg("count"), nb::arg("past"), nb::arg("threads"));
}

}  // namespace linstate
