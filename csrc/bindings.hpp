// What the files of bindings share.
#pragma once

#include <cstdint>

#include <nanobind/nanobind.h>

#include "kernels.hpp"

namespace linstate {

namespace nb = nanobind;

const Kernels& kernels_in_use();

void bind_token(nb::module_& m);
void bind_layers(nb::module_& m);

template <class T>
inline T* address(nb::handle h) {
    return h.is_none() ? nullptr : reinterpret_cast<T*>(nb::cast<std::uintptr_t>(h));
}

// (address, batch stride, time stride, head stride, is bf16), or None
inline Sequence sequence(nb::handle h) {
    Sequence s;
    if (h.is_none()) return s;
    const nb::tuple t = nb::cast<nb::tuple>(h);
    s.data = address<const void>(t[0]);
    s.batch = nb::cast<Size>(t[1]), s.time = nb::cast<Size>(t[2]), s.head = nb::cast<Size>(t[3]);
    s.dtype = nb::cast<bool>(t[4]) ? Dtype::bf16 : Dtype::f32;
    return s;
}

}  // namespace linstate
