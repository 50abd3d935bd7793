// What the files of bindings share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include <nanobind/nanobind.h>

#include "kernels.hpp"
#include "linear.hpp"
#include "norm.hpp"

namespace linstate {

namespace nb = nanobind;

const Kernels& kernels_in_use();

void bind_token(nb::module_& m);
void bind_attend(nb::module_& m);
void bind_block(nb::module_& m);
void bind_attention(nb::module_& m);
void bind_layers(nb::module_& m);
void bind_memory(nb::module_& m);
void bind_program(nb::module_& m);
void bind_rwkv(nb::module_& m);
void bind_row_attention(nb::module_& m);

// Products that need nothing of each other, as one.
struct LinearGroup {
    static constexpr std::size_t kMost = 16;
    std::vector<LinearCall> calls;

    // Adds a call, if it reads nothing that the others write.
    bool join(const LinearCall& call);
};

// What a binding makes of its arguments, and the work itself: a program (bind_program.cpp) keeps the one and repeats the other.
LinearCall read_linear(int format, Size rows, Size n, Size k, const nb::tuple& x, nb::handle weight, nb::handle scales,
                       nb::handle bias, const nb::tuple& out);
EmbedCall read_embed(int format, Size rows, Size n, Size k, nb::handle ids, nb::handle weight, nb::handle scales, nb::handle out);
NormCall read_norm(Size rows, Size groups, Size size, bool centre, float eps, const nb::tuple& x, nb::handle weight,
                   float weight_plus, nb::handle bias, int gate, nb::handle z, const nb::tuple& out);
GatedCall read_gated(Size rows, Size n, const nb::tuple& x, nb::handle out);
ActivationCall read_activation(int kind, Size n, nb::handle x, nb::handle out);
ShiftCall read_shift(Size rows, Size n, Size count, const nb::tuple& x, const nb::tuple& mix, const nb::tuple& out);
Rwkv7Call read_rwkv7(Size rows, Size heads, Size size, float eps, const nb::tuple& tensors, nb::handle out);
MixerCall read_mixer(const nb::tuple& sizes, const nb::tuple& numbers, Size rows, const nb::tuple& tensors, nb::handle out);
AttendToken read_attend(const nb::tuple& sizes, const nb::tuple& numbers, const nb::tuple& tensors, nb::handle out);
void place_states(AttendToken& token, const std::uintptr_t* at);
void run_call(const AttendToken& token, int threads);
void run_call(const LinearCall& call, int threads);
void run_call(const LinearGroup& group, int threads);
void run_call(const EmbedCall& call, int threads);
void run_call(const NormCall& call, int threads);
void run_call(const GatedCall& call, int threads);
void run_call(const AddCall& call, int threads);
void run_call(const ActivationCall& call, int threads);
void run_call(const MixerCall& call, int threads);
void run_call(const ShiftCall& call, int threads);
void run_call(const Rwkv7Call& call, int threads);

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

// (address, row stride, is bf16), or None
inline Sequence rows_of(nb::handle h) {
    Sequence s;
    if (h.is_none()) return s;
    const nb::tuple t = nb::cast<nb::tuple>(h);
    s.data = address<const void>(t[0]);
    s.batch = nb::cast<Size>(t[1]);
    s.dtype = nb::cast<bool>(t[2]) ? Dtype::bf16 : Dtype::f32;
    return s;
}

}  // namespace linstate
