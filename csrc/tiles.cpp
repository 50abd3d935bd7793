// The kernels for bf16 inputs on one matmul core of tiles.hpp; the rest of their instruction set's table is variant.cpp's.
// Compiled once for each, with LINSTATE_VARIANT, LINSTATE_TILES or LINSTATE_DOTS or both, and the compiler's options.
#include "attention.hpp"
#include "entry.hpp"
#include "matrix.hpp"
#include "tiles.hpp"

namespace linstate::LINSTATE_VARIANT {
namespace {

template <class Core>
constexpr Bf16Kernels on() {
    return {kernel<LinearAttention<Core>>(), kernel<DeltaRule<Core>>(), kernel<Dplr<Core>>(), matmul_core<Core>(),
            attention_kernel<Core>()};
}

}  // namespace

#if defined(LINSTATE_TILES)
const Bf16Kernels tiles = on<TileCore<TileEngine>>();
#endif
#if defined(LINSTATE_DOTS)
const Bf16Kernels dots = on<TileCore<DotEngine>>();
#endif

}  // namespace linstate::LINSTATE_VARIANT
