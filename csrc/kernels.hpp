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

// The sets of instructions that every file of csrc/kernels is compiled for. `wide` is for tests, on any processor with AVX2.
enum class Set : int { portable, avx2, avx512, wide };

// Declares a kernel's table, which its file in csrc/kernels defines for each set; bindings.hpp picks by LINSTATE_IN_USE.
#if defined(LINSTATE_X86)
#define LINSTATE_EVERY_SET(Table, name)                                      \
    namespace portable { extern const Table name; }                          \
    namespace avx2 { extern const Table name; }                              \
    namespace avx512 { extern const Table name; }                            \
    namespace wide { extern const Table name; }
#else
#define LINSTATE_EVERY_SET(Table, name) \
    namespace portable { extern const Table name; }
#endif

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
enum class Recurrence : int { linear_attention = 0, delta_rule = 1, dplr = 2 };
// Of an output: what z passes before it multiplies.
enum class OutputGate : int { none = 0, silu = 1, sigmoid = 2 };

// The recurrences on a matrix state [K, V] for each head.
struct MatrixCall {
    Size rows = 0;  // sequences
    Size tokens = 0;
    Size hk = 0, hv = 0, hg = 0, k = 0, v = 0;
    const Size* bounds = nullptr;  // [rows + 1] of packed sequences along T of batch entry 0, or null
    Sequence q, key, value, a, b, beta, g;
    Gate gate = Gate::none;
    const float* bonus = nullptr;  // [hv, k]
    const float* rates = nullptr;  // [hv, k, v], A of the elementwise scan
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

// The elementwise scan holds a tile of the state for all tokens: its columns are so few that tile and rates stay in the
// first-level cache.
inline Size scan_columns(Size k, Size step) {
    const Size fit = 2048 / (k > 0 ? k : 1) / step * step;
    return fit > step ? fit : step;
}

// The short convolution. Its state is the last taps - 1 inputs in float32.
struct ConvCall {
    Size rows = 0, tokens = 0, channels = 0, taps = 0;
    const Size* bounds = nullptr;
    Sequence x;  // no heads
    const void* weight = nullptr;  // [channels, taps]
    const void* bias = nullptr;    // [channels] or null
    Dtype weight_dtype = Dtype::f32, bias_dtype = Dtype::f32;
    bool silu = false;
    const float* before = nullptr;  // [rows, taps - 1, channels] or null: zeros
    float* after = nullptr;
    Output out;
};

struct ConvTask {
    Size row = 0, first = 0, last = 0;  // tokens of the sequence
    Size from = 0, to = 0;              // channels
};
inline constexpr Size CONV_COLUMNS = 512;

// Everything between the projections of a mixer, for one token: short convolution with SiLU, norms of q and k, gates, update
// of the state, norm of the output and its gate. What is null or none is left out. `batch` is the only stride that counts.
struct MixerCall {
    using Update = Recurrence;  // dplr is RWKV-7's, which has a call of its own
    // Log decay from the raw steps: -exp(rate) softplus(step + bias), for a head or for each channel; logsigmoid(step) /
    // divisor for each channel; the head's rate itself; -exp(step + bias) for each channel.
    enum class Decay : int { none = 0, head = 1, channel = 2, sigmoid = 3, fixed = 4, exponential = 5 };
    // Root mean square over a head, or over all heads that share a key head; mean and variance over a head.
    enum class Norm : int { none = 0, head = 1, group = 2, centred = 3 };
    using OutputGate = linstate::OutputGate;

    Size rows = 0, hk = 0, hv = 0, k = 0, v = 0;
    Update update = Update::linear_attention;
    Sequence mixed;                    // [rows, channels and more]: q, key and value are among the channels
    Size q_at = 0, k_at = 0, v_at = 0;
    Sequence key, value;               // [rows, hk k], [rows, hv v], where they are not
    bool elu_plus_one = false;         // of q and key
    const Size* position = nullptr;    // [rows]: channels i and i + k / 2 of q and key turn by position * base^(-2 i / k)
    double rotary_base = 0.0;
    const float* turn = nullptr;       // [rows, k]: the cosines of these angles, then their sines
    Size channels = 0, taps = 0;       // of the convolution, which begins at channel conv_at; no taps: none
    Size conv_at = 0;
    Sequence weight, bias;             // [channels, taps], [channels]
    const float* tail_before = nullptr;  // [rows, taps - 1, channels] or null: zeros
    float* tail_after = nullptr;
    float unit_eps = -1.0f;            // q and key to unit length where not negative
    float scale = 1.0f;
    Sequence beta;                     // [rows, hv], before its sigmoid
    float beta_scale = 1.0f;
    Decay decay = Decay::none;
    Sequence step, rate, step_bias;    // [rows, hv or hk k], [hv], as a row of step
    float divisor = 1.0f, step_low = 0.0f, step_high = 0.0f;
    bool stepped_values = false;       // value times the head's step
    Sequence skip;                     // [hv]: times value (before the step), added to the output
    Sequence bonus;                    // [hv, k]: the newest token is read with it, before it decays anything
    float normaliser_eps = -1.0f;      // where not negative: value has a further column of ones, by whose output + eps all is divided
    const float* before = nullptr;     // [rows, hv, k, columns()] or null: zeros
    float* after = nullptr;
    bool past = false;                 // the state goes past the caches
    Norm norm = Norm::none;
    bool gate_first = false;
    Sequence norm_weight, norm_bias;   // [v] of a head, else [hv v]
    float norm_eps = 0.0f;
    OutputGate gate = OutputGate::none;
    Sequence z;                        // [rows, hv v]
    Output out;                        // [rows, hv v]
    float* raw = nullptr;              // [rows, hv v]: where a key head has several tasks that share a norm, their outputs before it

    Size columns() const { return normaliser_eps < 0.0f ? v : v + 1; }
};

// Softmax attention of the last `tokens` tokens of keys and values, which are one behind the other in one tensor.
struct AttentionCall {
    Size rows = 0, tokens = 0, past = 0;  // past: keys before the first query's own
    Size hk = 0, groups = 0, k = 0, v = 0;  // hk * groups heads of q
    Sequence q, key, value;
    const Size* first = nullptr;  // [rows]: the first key that counts
    Size window = 0;              // how many keys a token sees, its own included; 0: all
    float scale = 1.0f;
    Output out;                   // as q, v numbers for each head
    Size tile() const {           // tokens of a task: some 256 rows with all heads of its key head
        const Size fit = 256 / groups / 16 * 16;
        return fit < 16 ? 16 : fit;
    }
};

// Tokens [from, to) of the heads that share a key head.
struct AttentionTask {
    Size row = 0, key_head = 0, from = 0, to = 0;
};

struct AttentionKernel {
    void (*run)(const AttentionCall&, const AttentionTask&, void* scratch) = nullptr;
    std::size_t (*scratch)(const AttentionCall&) = nullptr;
};

// RWKV's token shift, one token: out_m = x + (before - x) mix_m; the state is x.
struct ShiftCall {
    Size rows = 0, n = 0, count = 0;
    Sequence x;                      // [rows, n]
    Sequence mix;                    // [count, n]
    const float* before = nullptr;   // [rows, n] or null: zeros
    float* after = nullptr;
    Output out;                      // [count, rows, n]: time is the stride of count
};

// Everything of RWKV-7's time mix between its projections, for one token; linstate/mixers/rwkv7.py has the equations. All of
// [rows, heads size] and of [heads size].
struct Rwkv7Call {
    Size rows = 0, heads = 0, size = 0;
    Sequence r, key, value;
    Sequence decay, rate;               // w and a before their sigmoids
    Sequence value_rate, first_value;   // before its sigmoid; or nothing, in the first layer
    Sequence gate;
    Sequence k_k, k_a, r_k, weight, bias;
    float eps = 0.0f;
    const float* before = nullptr;      // [rows, heads, size, size] or null: zeros
    float* after = nullptr;
    bool past = false;                  // the state goes past the caches
    Output out;
};

// Keys and values of one row's softmax attention, bf16: place s of key head h begins at (s hk + h) k (at v for values).
struct AttendRow {
    std::uint16_t *keys = nullptr, *values = nullptr;  // of the first place that counts
    Size places = 0;                                   // that count, the newest token's among them
};

// One token of softmax attention between its projections: norms of the heads of q and key, rotation, the new place of keys and
// values, attention, output gate. What is null is left out. `batch` is the only stride that counts; a head's numbers are together.
struct AttendCall {
    Size rows = 0, hq = 0, hk = 0, k = 0, v = 0;
    Sequence q, key, value, z;        // [rows, hq k], [rows, hk k], [rows, hk v], [rows, hq v] before its sigmoid, bf16
    Sequence q_norm, k_norm;          // [k]: root mean square over a head; null: none
    float eps = 0.0f, weight_plus = 0.0f, scale = 1.0f;
    Size turned = 0;                  // channels i and i + turned / 2 of a head, i < turned / 2, turn by position * base^(-2 i / turned)
    double rotary_base = 0.0;
    const Size* position = nullptr;   // [rows]
    const float* turn = nullptr;      // [rows, turned]: the cosines of these angles, then their sines
    const AttendRow* row = nullptr;   // [rows]
    float* ready = nullptr;           // [rows, hq k]: q as it is multiplied
    float* part = nullptr;            // [rows, hk, blocks, group, v + 2]: weighted sum of values, largest logit, sum of weights
    Size blocks = 0;                  // of ATTEND_BLOCK places, of the longest row
    Output out;                       // [rows, hq v]
};
// The same for one row whose keys and values become longer by a place. Where they go on in the memory that they are in, `keys` is
// `keys_after`; else they are copied.
struct AttendToken {
    AttendCall call;
    const std::uint16_t *keys = nullptr, *values = nullptr;
    std::uint16_t *keys_after = nullptr, *values_after = nullptr;
    const Size *length = nullptr, *position = nullptr;  // of the places, the last ones, that count; of the tokens read
    Size *length_after = nullptr, *position_after = nullptr;
    Size places = 0;  // before
};
// So many places are one task, whatever the threads.
inline constexpr Size ATTEND_BLOCK = 256;

// The kernels that walk token by token.
struct TokenKernels {
    MatrixKernel selective_scan;
    MatrixKernel linear_attention_step, delta_rule_step, dplr_step;  // one token; scratch for v columns
    void (*conv)(const ConvCall&, const ConvTask&, void* scratch) = nullptr;
    std::size_t (*conv_scratch)(Size taps, Size channels) = nullptr;
    void (*mixer)(const MixerCall&, Size row, Size key_head, Size from, Size to, bool more, void* scratch) = nullptr;
    void (*mixer_finish)(const MixerCall&, Size row, Size key_head, void* scratch) = nullptr;
    std::size_t (*mixer_scratch)(const MixerCall&) = nullptr;
    void (*shift)(const ShiftCall&, Size row) = nullptr;
    void (*rwkv7)(const Rwkv7Call&, Size row, Size head, bool more, void* scratch) = nullptr;
    std::size_t (*rwkv7_scratch)(const Rwkv7Call&) = nullptr;
    void (*attend_begin)(const AttendCall&, Size row, void* scratch) = nullptr;
    void (*attend)(const AttendCall&, Size row, Size key_head, Size block, void* scratch) = nullptr;
    void (*attend_end)(const AttendCall&, Size row, Size key_head, void* scratch) = nullptr;
    std::size_t (*attend_scratch)(const AttendCall&) = nullptr;
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
    Set set = Set::portable;
    int lanes = 0;  // float32 lanes of a vector: value columns are split at multiples of `column_step`
    Size column_step = 0;
    MatrixKernel linear_attention, delta_rule, dplr;
    MatrixKernel linear_attention_bf16, delta_rule_bf16, dplr_bf16;  // for bf16 inputs
    const TokenKernels* token = nullptr;
    MatmulCore core, core_bf16;
    AttentionKernel attention, attention_bf16;
};

// What a matmul core for bf16 inputs (tiles.hpp) puts in place of a table's own entries.
struct Bf16Kernels {
    MatrixKernel linear_attention, delta_rule, dplr;
    MatmulCore core;
    AttentionKernel attention;
};

LINSTATE_EVERY_SET(Kernels, kernels)
#if defined(LINSTATE_X86)
namespace avx512_bf16 {
extern const Bf16Kernels dots;
}
namespace amx {
extern const Bf16Kernels tiles;
}
// For tests only: the instructions of the two above in plain code.
namespace emulated {
extern const Bf16Kernels dots, tiles;
}
#endif

}  // namespace linstate
