// What the bindings and the kernels agree on: plain arguments, and one table of functions for each instruction set.
//
// The files of a variant (variant.cpp and what it includes) are compiled once for each instruction set, in a namespace of
// its own. They use nothing of the C++ library that is not inlined for certain: a function that the linker could take from
// another variant would bring that variant's instructions to a processor that lacks them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace linstate {

using Size = std::int64_t;

enum class Dtype : int { f32 = 0, bf16 = 1 };

// A tensor [B, T, H, D] whose last axis is dense. Strides in elements.
struct Sequence {
    const void* data = nullptr;
    Size batch = 0, time = 0, head = 0;
    Dtype dtype = Dtype::f32;
};

struct Output {
    void* data = nullptr;
    Size batch = 0, time = 0, head = 0;
    Dtype dtype = Dtype::f32;
};

enum class Gate : int { none = 0, scalar = 1, channel = 2 };

// The recurrences on a matrix state [K, V] for each head.
struct MatrixCall {
    Size rows = 0;  // sequences
    Size tokens = 0;
    Size hk = 0, hv = 0, hg = 0, k = 0, v = 0;
    const Size* bounds = nullptr;  // [rows + 1] of packed sequences along T of batch entry 0, or null
    Sequence q, key, value, a, b, beta, g;
    Gate gate = Gate::none;
    const float* bonus = nullptr;  // [hv, k]
    float scale = 1.0f;
    const float* before = nullptr;  // [rows, hv, k, v] or null: zeros
    float* after = nullptr;         // [rows, hv, k, v]
    Output out;
    // The state after every `every` tokens (a multiple of the chunk), [rows, hv, count, k, v]: prefix checkpoints.
    float* snapshots = nullptr;
    Size every = 0, snapshot_count = 0;
};

// One head of one sequence, value columns [from, to): tasks are independent of each other.
struct MatrixTask {
    Size row = 0, head = 0, from = 0, to = 0;
};

using MatrixRun = void (*)(const MatrixCall&, const MatrixTask&, void* scratch);
using MatrixScratch = std::size_t (*)(Size k, Size v);  // bytes for v columns

struct MatrixKernel {
    MatrixRun run = nullptr;
    MatrixScratch scratch = nullptr;
};

// One call of a matmul core, for its tests. Every dimension is at most `room`.
struct GemmCall {
    Size m = 0, n = 0, k = 0, room = 0;
    const float* a = nullptr;
    Size lda = 0;
    const float* b = nullptr;
    Size ldb = 0;
    float* c = nullptr;
    Size ldc = 0;
    bool keep = false;
    const float* row_scale = nullptr;
    int shape = 0;
};

struct MatmulCore {
    void (*gemm)(const GemmCall&, void* scratch) = nullptr;
    void (*solve)(const GemmCall&, void* scratch) = nullptr;  // a: the triangle, c: the right-hand sides
    std::size_t (*scratch)(Size k, Size v) = nullptr;
};

struct Kernels {
    const char* isa = "";
    int lanes = 0;  // float32 lanes of a vector: value columns are split at multiples of `column_step`
    Size column_step = 0;
    MatrixKernel linear_attention, delta_rule, dplr;
    MatrixKernel linear_attention_bf16, delta_rule_bf16, dplr_bf16;  // for bf16 inputs
    MatmulCore core, core_bf16;
};

// What a matmul core for bf16 inputs (tiles.hpp) puts in place of a table's own entries.
struct Bf16Kernels {
    MatrixKernel linear_attention, delta_rule, dplr;
    MatmulCore core;
};

namespace portable {
extern const Kernels kernels;
}
#if defined(LINSTATE_X86)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Bf16Kernels dots;
}
namespace amx {
extern const Bf16Kernels tiles;
}
// For tests only, on any processor with AVX2: vectors of 16 lanes, and the instructions of the two above in plain code.
namespace wide {
extern const Kernels kernels;
}
namespace emulated {
extern const Bf16Kernels dots, tiles;
}
#endif

}  // namespace linstate
