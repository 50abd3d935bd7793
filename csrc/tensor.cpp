// See tensor.hpp.

#include "tensor.hpp"

namespace linstate {
namespace {

// What DLPack 1.x fixes in memory: https://github.com/dmlc/dlpack/blob/main/include/dlpack/dlpack.h
struct DlTensor {
    void* data;
    std::int32_t device_type, device_id;
    std::int32_t dims;
    std::uint8_t code, bits;
    std::uint16_t lanes;
    std::int64_t *shape, *strides;
    std::uint64_t offset;  // bytes
};
struct DlExchange {
    std::uint32_t major, minor;
    DlExchange* older;
    void* of_owners[3];
    int (*view)(void* object, DlTensor* out);  // borrows; sets a Python error where it returns other than 0
};
constexpr int kCpu = 1, kInteger = 0, kFloat = 2, kBfloat = 4;

struct Torch {
    PyTypeObject* tensor = nullptr;
    const DlExchange* exchange = nullptr;
};

// Of the torch that is imported; tensors of none can come otherwise. Null members where there is none, or too old a one.
Torch find() {
    Torch found;
    PyObject* module = PyImport_ImportModule("torch");
    PyObject* type = module ? PyObject_GetAttrString(module, "Tensor") : nullptr;
    PyObject* capsule = type ? PyObject_GetAttrString(type, "__dlpack_c_exchange_api__") : nullptr;
    if (capsule) {
        auto* api = static_cast<const DlExchange*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
        while (api && api->major > 1) api = api->older;
        if (api && api->major == 1 && api->view) found = {reinterpret_cast<PyTypeObject*>(type), api};
    }
    PyErr_Clear();
    Py_XDECREF(capsule);
    Py_XDECREF(module);  // the type is kept for as long as the process lives
    return found;
}

const Torch& torch() {
    static const Torch one = find();
    return one;
}

Tensor::Type type_of(const DlTensor& t) {
    if (t.lanes != 1) return Tensor::Type::other;
    if (t.code == kFloat && t.bits == 32) return Tensor::Type::f32;
    if (t.code == kBfloat && t.bits == 16) return Tensor::Type::bf16;
    if (t.code == kInteger && t.bits == 32) return Tensor::Type::i32;
    if (t.code == kInteger && t.bits == 64) return Tensor::Type::i64;
    return Tensor::Type::other;
}

const char* name_of(Tensor::Type type) {
    switch (type) {
        case Tensor::Type::f32: return "float32";
        case Tensor::Type::bf16: return "bfloat16";
        case Tensor::Type::i32: return "int32";
        case Tensor::Type::i64: return "int64";
        default: return "of another dtype";
    }
}

int bytes_of(Tensor::Type type) { return type == Tensor::Type::bf16 ? 2 : type == Tensor::Type::i64 ? 8 : 4; }

template <class List>
std::string written(const List& numbers, std::size_t count) {
    std::string text = "[";
    for (std::size_t i = 0; i < count; ++i) {
        if (i > 0) text += ", ";
        const Size n = *(numbers + i);
        text += n < 0 ? "any" : std::to_string(n);
    }
    return text + "]";
}

bool empty(const Tensor& t) {
    for (int i = 0; i < t.dims; ++i)
        if (t.shape[i] == 0) return true;
    return false;
}

bool aligned(const Tensor& t) { return reinterpret_cast<std::uintptr_t>(t.data) % std::uintptr_t(bytes_of(t.type)) == 0; }

// Whether axes [first, dims) have no gaps between them.
bool gapless(const Tensor& t, int first) {
    Size next = 1;
    for (int i = t.dims - 1; i >= first; --i) {
        if (t.shape[i] != 1 && t.strides[i] != next) return false;
        next *= t.shape[i];
    }
    return true;
}

}  // namespace

bool view(PyObject* object, Tensor& tensor) noexcept {
    const Torch& t = torch();
    if (!t.exchange || !PyObject_TypeCheck(object, t.tensor)) return false;
    DlTensor found;
    if (t.exchange->view(object, &found) != 0) {
        PyErr_Clear();
        return false;
    }
    if (found.device_type != kCpu) return false;
    tensor.data = static_cast<const char*>(found.data) + found.offset;
    tensor.dims = found.dims, tensor.shape = found.shape, tensor.strides = found.strides;
    tensor.type = type_of(found), tensor.given = true;
    return true;
}

void Check::refuse(const std::string& message) const { throw ArgumentError(std::string(call_) + ": " + message); }

bool Check::fits_shape(const Tensor& t, Shape shape) const {
    if (t.dims != int(shape.size())) return false;
    const Size* want = shape.begin();
    for (int i = 0; i < t.dims; ++i)
        if (want[i] != kAny && want[i] != t.shape[i]) return false;
    return true;
}

void Check::fits(const char* name, const Tensor& t, Shape shape, bool floating, Tensor::Type type) const {
    const bool typed = floating ? t.type == Tensor::Type::f32 || t.type == Tensor::Type::bf16 : t.type == type;
    if (typed && aligned(t) && fits_shape(t, shape)) return;
    refuse(std::string(name) + " must be " + (floating ? "float32 or bfloat16" : name_of(type)) + " " +
           written(shape.begin(), shape.size()) + (aligned(t) ? "" : ", aligned to its numbers") + ", got " + name_of(t.type) + " " +
           written(t.shape, std::size_t(t.dims)));
}

Sequence Check::sequence(const char* name, const Tensor& t, Shape shape, bool dense) const {
    Sequence s;
    if (!t) return s;
    fits(name, t, shape, true, t.type);
    if ((t.dims == 4 || dense) && t.last() > 1 && t.strides[t.dims - 1] != 1 && !empty(t))
        refuse(std::string(name) + " must have a dense last axis, got a stride of " + std::to_string(t.strides[t.dims - 1]));
    s.data = t.data, s.dtype = t.narrow() ? Dtype::bf16 : Dtype::f32;
    s.batch = t.strides[0], s.time = t.strides[1], s.head = dense ? 0 : t.strides[2];
    return s;
}

Output Check::output(const char* name, const Tensor& t, Shape shape, bool dense) const {
    const Sequence s = sequence(name, t, shape, dense);
    return {const_cast<void*>(s.data), s.batch, s.time, s.head, s.dtype};
}

Sequence Check::rows(const char* name, const Tensor& t, Size count, Size size) const {
    Sequence s;
    if (!t) return s;
    if (t.dims == 0 || t.last() != size || rows_of(t) != count || t.type > Tensor::Type::bf16 || !aligned(t))
        refuse(std::string(name) + " must be float32 or bfloat16 with " + std::to_string(count) + " rows of " + std::to_string(size) +
               ", got " + name_of(t.type) + " " + written(t.shape, std::size_t(t.dims)));
    s.data = t.data, s.dtype = t.narrow() ? Dtype::bf16 : Dtype::f32, s.batch = size;
    if (count == 0 || size == 0) return s;
    if (size > 1 && t.strides[t.dims - 1] != 1) refuse(std::string(name) + " must have dense rows");
    Size next = -1;  // the stride that an axis must have to go on where those after it end
    for (int i = t.dims - 2; i >= 0; --i) {
        if (t.shape[i] == 1) continue;
        if (next < 0) next = s.batch = t.strides[i];
        if (t.strides[i] != next) refuse(std::string(name) + " must have one stride between all rows");
        next *= t.shape[i];
    }
    return s;
}

Output Check::rows_out(const char* name, const Tensor& t, Size count, Size size) const {
    const Sequence s = rows(name, t, count, size);
    Output o;
    o.data = const_cast<void*>(s.data), o.batch = s.batch, o.dtype = s.dtype;
    return o;
}

const void* Check::flat(const char* name, const Tensor& t, Size numbers, Tensor::Type type) const {
    if (!t) return nullptr;
    const Size count = numbers_of(t);
    if (t.type != type || count != numbers || !aligned(t) || (count > 0 && !gapless(t, 0)))
        refuse(std::string(name) + " must be " + std::to_string(numbers) + " numbers without gaps, " + name_of(type) + ", got " +
               name_of(t.type) + " " + written(t.shape, std::size_t(t.dims)) + " with strides " +
               written(t.strides, std::size_t(t.dims)));
    return t.data;
}

Sequence Check::weight(const char* name, const Tensor& t, Size numbers) const {
    Sequence s;
    if (!t) return s;
    s.data = flat(name, t, numbers, t.narrow() ? Tensor::Type::bf16 : Tensor::Type::f32);
    s.dtype = t.narrow() ? Dtype::bf16 : Dtype::f32;
    return s;
}

const void* Check::whole(const char* name, const Tensor& t, Shape shape, Tensor::Type type) const {
    if (!t) return nullptr;
    fits(name, t, shape, false, type);
    if (!empty(t) && !gapless(t, 0))
        refuse(std::string(name) + " must have no gaps, got strides " + written(t.strides, std::size_t(t.dims)));
    return t.data;
}

const Size* Check::bounds(const Tensor& t, Size batch, Size tokens, Size& rows) const {
    rows = batch;
    if (!t) return nullptr;
    const Size* at = integers("bounds", t, {kAny});
    that(batch == 1 && t.size(0) > 0, "with bounds there is one batch entry");
    rows = t.size(0) - 1;
    bool rising = at[0] == 0 && at[rows] == tokens;
    for (Size i = 0; i < rows; ++i) rising = rising && at[i] <= at[i + 1];
    that(rising, "bounds must rise from 0 to the number of tokens");
    return at;
}

}  // namespace linstate
