// What the processor has and the operating system supports.
#pragma once

namespace linstate {

struct CpuFeatures {
    bool avx2 = false;
    bool fma = false;
    bool avx512f = false;
    bool avx512 = false;  // F, BW, DQ and VL: what the kernels are compiled for
    bool avx512_bf16 = false;
    bool amx_bf16 = false;
    bool neon = false;
};

CpuFeatures detect();

// Asks the operating system for the tile registers where it wants to be asked (Linux); whether they may be used.
bool allow_tiles();

}  // namespace linstate
