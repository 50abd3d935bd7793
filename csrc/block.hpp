// What the bindings and the kernels agree on about many tokens of a mixer between its projections: gates before the recurrence,
// norm and gate behind it. The convolution and the recurrence are calls of their own (kernels.hpp).
#pragma once

#include "kernels.hpp"

namespace linstate {

// What the recurrence reads, of every token: q and key at unit length, the value times the head's step, beta behind its sigmoid,
// log decays. `batch` is the stride of tokens. What is not wanted stays as it is among the channels of mixer.mixed.
struct MixerGates {
    MixerCall mixer;  // rows are tokens; mixed, as the convolution leaves it, q_at, key, value, beta, step and what belongs to them
    Output q, key, value, beta, g;
};

// Norm and gate of what the recurrence made, [rows, hv v], with value (before the step) times skip added to it.
struct MixerFinish {
    MixerCall mixer;
    Sequence made;
};

// RWKV's token shift of sequences of so many tokens: rows are tokens, before [rows / tokens, n]; `after` is not written.
struct ShiftTokens {
    ShiftCall shift;
    Size tokens = 0;
};

// RWKV-7: key and value as they are written, a and b of the recurrence, the log decay; all [rows, heads size].
struct Rwkv7Gates {
    Rwkv7Call mixer;  // rows are tokens
    Output key, value, a, b, g;
};
struct Rwkv7Finish {
    Rwkv7Call mixer;  // with key and value as they are written
    Sequence made;
};

// out = x + y of n numbers, x and out in float32, y in bf16: a residual stream and what a branch made.
struct StreamCall {
    Size n = 0;
    const float* x = nullptr;
    const std::uint16_t* y = nullptr;
    float* out = nullptr;
};

struct BlockKernels {  // rows [first, last)
    void (*gates)(const MixerGates&, Size first, Size last, void* scratch) = nullptr;
    void (*finish)(const MixerFinish&, Size first, Size last, void* scratch) = nullptr;
    void (*shift)(const ShiftTokens&, Size first, Size last, void* scratch) = nullptr;
    void (*rwkv7_gates)(const Rwkv7Gates&, Size first, Size last, void* scratch) = nullptr;
    void (*rwkv7_finish)(const Rwkv7Finish&, Size first, Size last, void* scratch) = nullptr;
    void (*stream)(const StreamCall&, Size first, Size last, void* scratch) = nullptr;  // rows of STREAM_ROW numbers
};

inline constexpr Size STREAM_ROW = 1024;

// Room for one token, in bytes.
inline std::size_t block_scratch(const MixerCall& call) {
    return std::size_t(6 * (call.hk * call.k + call.hv * call.v + call.hv) + 16 * 64) * 4;
}
inline std::size_t block_scratch(const ShiftCall& call) { return std::size_t(3 * call.n + 4 * 64) * 4; }
inline std::size_t block_scratch(const Rwkv7Call& call) { return std::size_t(8 * call.size + 8 * 64) * 4; }

LINSTATE_EVERY_SET(BlockKernels, between)

}  // namespace linstate
