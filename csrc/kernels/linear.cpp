// The packed linear layer of one instruction set. Compiled once for each, as variant.cpp and tiles.cpp are.
#include "linear_panel.hpp"

namespace linstate::LINSTATE_VARIANT {

#if defined(LINSTATE_TILES)
const LinearKernels linear_tiles = linear_kernels<PairPanel<TileEngine>>();
#endif
#if defined(LINSTATE_DOTS)
const LinearKernels linear_dots = linear_kernels<PairPanel<DotEngine>>();
#endif
#if !defined(LINSTATE_TILES) && !defined(LINSTATE_DOTS)
const LinearKernels linear = linear_kernels<PlainPanel>();
#endif

}  // namespace linstate::LINSTATE_VARIANT
