// Arguments as addresses and strides that Python wrote down: what the calls of whole mixers still take. Every other call takes
// tensors (tensor.hpp).
#pragma once

#include "tensor.hpp"

namespace linstate {

template <class T>
inline T* address(nb::handle h) {
    return h.is_none() ? nullptr : reinterpret_cast<T*>(nb::cast<std::uintptr_t>(h));
}

// (address, row stride, is bf16), or None
inline Sequence row_sequence(nb::handle h) {
    Sequence s;
    if (h.is_none()) return s;
    const nb::tuple t = nb::cast<nb::tuple>(h);
    s.data = address<const void>(t[0]);
    s.batch = nb::cast<Size>(t[1]);
    s.dtype = nb::cast<bool>(t[2]) ? Dtype::bf16 : Dtype::f32;
    return s;
}
inline Output row_output(nb::handle h) {
    const Sequence s = row_sequence(h);
    Output o;
    o.data = const_cast<void*>(s.data), o.batch = s.batch, o.dtype = s.dtype;
    return o;
}

}  // namespace linstate
