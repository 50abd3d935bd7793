// What the bindings and the kernels agree on about y = x W^T + b with a weight that was packed once (docs/performance.md).
//
// Apart from kernels.hpp, as these kernels have a table of their own: the recurrences do not know of weights.
#pragma once

#include "kernels.hpp"

namespace linstate {

// A packed weight is panels of PANEL output columns, one behind the other, the last filled up with zeros; k is a multiple of
// LINEAR_STEP, filled up with zeros. Within a panel, words of 32 bits, a row of PANEL of them (one for each column) for
//   bf16  2 k, [k / 2][PANEL]: the lower k in the lower half, as the dot products of AVX512-BF16 and AMX read them;
//   int8  4 k, [k / 4][PANEL]: k, k + 2 in the bytes of the lower half, k + 1, k + 3 in those of the upper, each + 128;
//   int4  8 k, [k / 8][PANEL]: k, k + 2, k + 4, k + 6 in the nibbles of the lower half, the odd k in the upper, each + 8.
// So one shift brings the codes of a pair of k to the lowest bits of both halves. A code counts in units of a bf16 scale,
// one for GROUP k of a column: [panel][k / GROUP][PANEL].
inline constexpr Size PANEL = 32, LINEAR_STEP = 32, GROUP = 32;

enum class Format : int { bf16 = 16, int8 = 8, int4 = 4 };

struct LinearCall {
    Size rows = 0, n = 0, k = 0;  // y [rows, n], k as padded
    Format format = Format::bf16;
    const std::uint16_t* x = nullptr;  // bf16 [rows, k], rows x_stride apart, an even number
    Size x_stride = 0;
    const void* weight = nullptr;
    const std::uint16_t* scales = nullptr;
    Sequence bias;  // [n], or nothing
    Output out;     // batch is the stride of rows
};

// Rows of a packed weight, as numbers in bf16: [rows, k], without gaps.
struct EmbedCall {
    Size rows = 0, n = 0, k = 0, kp = 0;  // of a weight [n, k]; kp: as padded
    Format format = Format::bf16;
    const Size* ids = nullptr;  // [rows]
    const void* weight = nullptr;
    const std::uint16_t* scales = nullptr;
    std::uint16_t* out = nullptr;
};

struct LinearKernels {
    void (*run)(const LinearCall&, Size first, Size last, void* scratch) = nullptr;  // panels [first, last)
    std::size_t (*scratch)(const LinearCall&) = nullptr;
};

inline Size panel_words(Size k, Format format) { return k * PANEL * Size(format) / 32; }

LINSTATE_EVERY_SET(LinearKernels, linear)
#if defined(LINSTATE_X86)
namespace avx512_bf16 {
extern const LinearKernels linear_dots;
}
namespace amx {
extern const LinearKernels linear_tiles;
}
namespace emulated {
extern const LinearKernels linear_dots, linear_tiles;
}
#endif

}  // namespace linstate
