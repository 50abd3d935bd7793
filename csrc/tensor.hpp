// Torch's tensors as the bindings take them, and the one place where what they say of themselves is held against what a kernel needs.
// Nothing becomes an address before its dtype, device, shape, strides and alignment were checked here.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include <nanobind/nanobind.h>

#include "kernels.hpp"

namespace linstate {

namespace nb = nanobind;

// linstate.errors.ArgumentError in Python.
struct ArgumentError : std::invalid_argument {
    using std::invalid_argument::invalid_argument;
};

// A tensor while a call holds it: shape and strides lie in torch. Torch fills it in through DLPack's table of C functions, so the
// module links against no torch.
struct Tensor {
    enum class Type : std::uint8_t { f32, bf16, i32, i64, other };

    const void* data = nullptr;
    int dims = 0;
    const std::int64_t *shape = nullptr, *strides = nullptr;
    Type type = Type::other;
    bool given = false;  // false: None

    explicit operator bool() const { return given; }
    Size size(int axis) const { return shape[axis]; }
    Size last() const { return dims > 0 ? shape[dims - 1] : 0; }
    bool narrow() const { return type == Type::bf16; }
};
// Where None is allowed.
struct MaybeTensor : Tensor {};

// False, and no Python error, where `object` is no tensor of numbers in the CPU's memory.
bool view(PyObject* object, Tensor& tensor) noexcept;

// The checks of one call, which error messages name.
class Check {
    const char* call_;

    using Shape = std::initializer_list<Size>;

    void fits(const char* name, const Tensor& t, Shape shape, bool floating, Tensor::Type type) const;
    bool fits_shape(const Tensor& t, Shape shape) const;

   public:
    static constexpr Size kAny = -1;  // of a shape

    explicit Check(const char* call) : call_(call) {}

    [[noreturn]] void refuse(const std::string& message) const;
    void that(bool holds, const char* message) const {
        if (!holds) refuse(message);
    }

    // float32 or bf16, [B, T, H, D], [B, T, H] or [B, T, D]: any strides, of the first three axes; a fourth is dense, and a third where
    // it is one of channels (`dense`).
    Sequence sequence(const char* name, const Tensor& t, Shape shape, bool dense = false) const;
    Output output(const char* name, const Tensor& t, Shape shape, bool dense = false) const;
    // float32 or bf16, [..., D] with one stride between all rows, which are dense: `batch` is that stride.
    Sequence rows(const char* name, const Tensor& t, Size count, Size size) const;
    Output rows_out(const char* name, const Tensor& t, Size count, Size size) const;
    // float32 or bf16 without gaps, so many numbers.
    Sequence weight(const char* name, const Tensor& t, Size numbers) const;
    // Without gaps, of one type. Null for None.
    const void* whole(const char* name, const Tensor& t, Shape shape, Tensor::Type type) const;
    const float* floats(const char* name, const Tensor& t, Shape shape) const {
        return static_cast<const float*>(whole(name, t, shape, Tensor::Type::f32));
    }
    float* floats_out(const char* name, const Tensor& t, Shape shape) const { return const_cast<float*>(floats(name, t, shape)); }
    const std::uint16_t* narrow(const char* name, const Tensor& t, Shape shape) const {
        return static_cast<const std::uint16_t*>(whole(name, t, shape, Tensor::Type::bf16));
    }
    const Size* integers(const char* name, const Tensor& t, Shape shape) const {
        return static_cast<const Size*>(whole(name, t, shape, Tensor::Type::i64));
    }
    // So many numbers without gaps, whatever their axes.
    const void* flat(const char* name, const Tensor& t, Size numbers, Tensor::Type type) const;
    // Boundaries of packed sequences, int64 [rows + 1], rising from 0 to `tokens`. Null for None; `rows` is set.
    const Size* bounds(const Tensor& t, Size batch, Size tokens, Size& rows) const;
};

// Numbers of a tensor, and its rows: all axes but the last.
inline Size rows_of(const Tensor& t) {
    Size rows = 1;
    for (int i = 0; i + 1 < t.dims; ++i) rows *= t.size(i);
    return rows;
}
inline Size numbers_of(const Tensor& t) { return t.dims > 0 ? rows_of(t) * t.last() : 1; }

// The axes of a tensor that must have so many of them.
inline void expect_dims(const Check& check, const char* name, const Tensor& t, int dims) {
    if (t.dims != dims)
        check.refuse(std::string(name) + " must have " + std::to_string(dims) + " axes, got " + std::to_string(t.dims));
}

}  // namespace linstate

namespace nanobind::detail {

// Signatures say `| None` of an argument that takes None by themselves.
template <>
struct remove_opt_mono<linstate::MaybeTensor> : remove_opt_mono<linstate::Tensor> {};

template <>
struct type_caster<linstate::Tensor> {
    NB_TYPE_CASTER(linstate::Tensor, const_name("torch.Tensor"))

    bool from_python(handle src, std::uint8_t, cleanup_list*) noexcept { return linstate::view(src.ptr(), value); }
    static handle from_cpp(const linstate::Tensor&, rv_policy, cleanup_list*) noexcept { return handle(); }
};

template <>
struct type_caster<linstate::MaybeTensor> {
    NB_TYPE_CASTER(linstate::MaybeTensor, const_name("torch.Tensor | None"))

    bool from_python(handle src, std::uint8_t, cleanup_list*) noexcept {
        value = {};
        return src.is_none() || linstate::view(src.ptr(), value);
    }
    static handle from_cpp(const linstate::MaybeTensor&, rv_policy, cleanup_list*) noexcept { return handle(); }
};

}  // namespace nanobind::detail
