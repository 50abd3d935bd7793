// What the bindings and the kernels agree on about softmax attention of one token: each row looks at places of its own, wherever
// they lie in memory. Their table, apart from kernels.hpp as norm.hpp's.
#pragma once

#include "kernels.hpp"

namespace linstate {

// The places of one row. The newest token's key and value are the call's; they are written behind `moved` of the last places at
// `to`: right behind the others in the same buffer (moved = 0), or into a cache of its own that takes the last places along.
struct RowPlaces {
    const void* keys = nullptr;    // null: the token sees only itself, and is written nowhere
    const void* values = nullptr;
    Size places = 0;               // before the newest token
    void* to_keys = nullptr;       // or null: written nowhere
    void* to_values = nullptr;
    Size moved = 0;
};

// One token of softmax attention: heads of a group share a key head. Keys, values and what is written of them have one type.
struct RowAttentionCall {
    Size rows = 0, hq = 0, hk = 0, k = 0, v = 0;
    Sequence q, key, value;           // [rows, hq, k], [rows, hk, k], [rows, hk, v]: the newest token
    Size key_place = 0, key_head = 0;      // strides of a row's places and heads
    Size value_place = 0, value_head = 0;
    Dtype dtype = Dtype::f32;              // of keys and values, all of them
    const RowPlaces* row = nullptr;   // [rows]
    Size most = 0;                    // of all rows' places
    float scale = 1.0f;
    Output out;                       // [rows, hq, v]
};

struct RowAttentionKernels {
    void (*run)(const RowAttentionCall&, Size row, Size key_head, void* scratch) = nullptr;
};

inline std::size_t row_attention_scratch(const RowAttentionCall& call) {
    const Size groups = call.hk > 0 ? call.hq / call.hk : 0;
    const Size floats = (groups + 1) * (call.k + 32) + (groups + 1) * (call.v + 32) + groups * (call.most + 32);
    return std::size_t(floats) * 4 + 64 * 8;
}

LINSTATE_EVERY_SET(RowAttentionKernels, row_attention)

}  // namespace linstate
