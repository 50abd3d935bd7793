// Softmax attention of one token, of one instruction set. Compiled once for each, as variant.cpp is.
//
// A row's keys and values are read once from memory, for all query heads that share them, and that is what it costs. All
// arithmetic is in float32, in an order that depends on the row's own places alone: not on where they lie, on other rows, or on
// threads. Sums over places go by blocks, so that their rounding grows with the number of blocks and not of places.
#include "row_attention.hpp"

#include "chunk.hpp"
#include "entry.hpp"

namespace linstate::LINSTATE_VARIANT {
namespace {

inline constexpr int SUMS = W >= 16 ? 16 : 8;  // that stay in registers beside what is added to them
inline constexpr Size BLOCK = 256;             // places
inline constexpr Size AHEAD = 32;              // places that are fetched before they are used

template <bool Narrow>
LINSTATE_INLINE F load_as(const void* data, Size at) {
    if constexpr (Narrow) return load_bf16(static_cast<const std::uint16_t*>(data) + at);
    return load(static_cast<const float*>(data) + at);
}
template <bool Narrow>
LINSTATE_INLINE F load_end(const void* data, Size at, Size n) {
    float part[W] = {};
    for (Size i = 0; i < n; ++i) part[i] = read_one(data, Narrow ? Dtype::bf16 : Dtype::f32, at + i);
    return load(part);
}

// As `sum`, in the same order, without memory: half of the lanes are added to the other half, again and again.
template <class Half, class Vector>
LINSTATE_INLINE Half folded(Vector x) {
    static_assert(2 * sizeof(Half) == sizeof x);
    Half low, high;
    __builtin_memcpy(&low, &x, sizeof low);
    __builtin_memcpy(&high, reinterpret_cast<const char*>(&x) + sizeof low, sizeof high);
    return low + high;
}
LINSTATE_INLINE float lanes(F x) {
    typedef float Two __attribute__((vector_size(8)));
    typedef float Four __attribute__((vector_size(16)));
#if LINSTATE_LANES == 16
    typedef float Eight __attribute__((vector_size(32)));
    const Two two = folded<Two>(folded<Four>(folded<Eight>(x)));
#elif LINSTATE_LANES == 8
    const Two two = folded<Two>(folded<Four>(x));
#else
    const Two two = folded<Two>(x);
#endif
    return two[0] + two[1];
}

// The caches fetch ahead within a page; a row of places crosses one every few.
template <bool Narrow>
LINSTATE_INLINE void fetch(const void* data, Size at) {
    if constexpr (Narrow)
        __builtin_prefetch(static_cast<const std::uint16_t*>(data) + at);
    else
        __builtin_prefetch(static_cast<const float*>(data) + at);
}

// scores[g, s] = q_g . key_s for n places, one after the other as they lie: in any other order memory is read at half the speed
template <bool Narrow, int G>
LINSTATE_INLINE void score(const RowAttentionCall& c, const void* keys, Size at, const float* q, Size ldq, Size n, float* scores,
                           Size lds) {
    const Size whole = c.k / W * W;
    for (Size s = 0; s < n; ++s) {
        const Size from = at + s * c.key_place;
        F sums[G] = {};
        for (Size i = 0; i < whole; i += W) {
            fetch<Narrow>(keys, from + AHEAD * c.key_place + i);
            const F key = load_as<Narrow>(keys, from + i);
#pragma GCC unroll 4
            for (int g = 0; g < G; ++g) sums[g] += key * load(q + g * ldq + i);
        }
        if (whole < c.k) {
            const F key = load_end<Narrow>(keys, from + whole, c.k - whole);
            for (int g = 0; g < G; ++g) sums[g] += key * load(q + g * ldq + whole);
        }
        for (int g = 0; g < G; ++g) scores[g * lds + s] = lanes(sums[g]);
    }
}

// out[g, columns] += sum_s weights[g, s] value_s for places [first, last); `n` columns, of less than a vector only where C is 1
template <bool Narrow, int G, int C>
LINSTATE_INLINE void weigh(const RowAttentionCall& c, const void* values, Size at, const float* weights, Size ldw, Size first,
                           Size last, float* out, Size ldo, Size n) {
    F sums[G][C] = {};
    for (Size s = first; s < last; ++s)
#pragma GCC unroll 8
        for (int j = 0; j < C; ++j) {
            const Size from = at + s * c.value_place + j * W;
            if (C > 1) fetch<Narrow>(values, from + AHEAD * c.value_place);
            const F value = C == 1 && n < W ? load_end<Narrow>(values, from, n) : load_as<Narrow>(values, from);
#pragma GCC unroll 4
            for (int g = 0; g < G; ++g) sums[g][j] += value * weights[g * ldw + s];
        }
    for (int g = 0; g < G; ++g)
        for (int j = 0; j < C; ++j) store(out + g * ldo + j * W, load(out + g * ldo + j * W) + sums[g][j]);
}

struct Scratch {
    float *q, *key, *value, *weights, *out;
    Size ldq, ldw, ldo;
};

template <bool Narrow, int G>
void heads(const RowAttentionCall& c, const RowPlaces& row, Size key_at, Size value_at, const Scratch& s, Size first) {
    constexpr int C = SUMS / G > 8 ? 8 : SUMS / G;
    const float* q = s.q + first * s.ldq;
    float *weights = s.weights + first * s.ldw, *out = s.out + first * s.ldo;
    const Size n = row.keys ? row.places : 0;
    score<Narrow, G>(c, row.keys, key_at, q, s.ldq, n, weights, s.ldw);
    for (int g = 0; g < G; ++g) {
        float* w = weights + g * s.ldw;
        w[n] = dot(q + g * s.ldq, s.key, s.ldq);
        const Size padded = round_up(n + 1, W);
        for (Size i = n + 1; i < padded; ++i) w[i] = -__builtin_inff();
        F most = load(w);
        for (Size i = W; i < padded; i += W) most = max(most, load(w + i));
        float top = most[0];
        for (int i = 1; i < W; ++i) top = most[i] > top ? most[i] : top;
        float total = 0.0f;
        for (Size at = 0; at < padded; at += BLOCK) {
            const Size end = at + BLOCK < padded ? at + BLOCK : padded;
            F sums = F{};
            for (Size i = at; i < end; i += W) {
                const F e = exp(load(w + i) - all(top));
                store(w + i, e);
                sums += e;
            }
            total += sum(sums);
        }
        multiply(w, 1.0f / total, padded);
        for (Size i = 0; i < s.ldo; i += W) store(out + g * s.ldo + i, load(s.value + i) * w[n]);
    }
    for (Size at = 0; at < n; at += BLOCK) {
        const Size end = at + BLOCK < n ? at + BLOCK : n;
        Size i = 0;
        for (; i + C * W <= c.v; i += C * W)
            weigh<Narrow, G, C>(c, row.values, value_at + i, weights, s.ldw, at, end, out + i, s.ldo, C * W);
        for (; i < c.v; i += W)
            weigh<Narrow, G, 1>(c, row.values, value_at + i, weights, s.ldw, at, end, out + i, s.ldo,
                                c.v - i < W ? c.v - i : W);
    }
}

// The newest token, behind the places that go along.
void keep(void* to, const void* from, Size places, Size moved, Size stride, Size head, const Sequence& newest, Size at,
          Size n, Size bytes) {
    if (!to) return;
    const auto place = [&](const void* base, Size i) {
        return static_cast<const char*>(base) + (i * stride + head) * bytes;
    };
    for (Size i = 0; i < moved; ++i)
        std::memcpy(const_cast<char*>(place(to, i)), place(from, places - moved + i), std::size_t(n * bytes));
    std::memcpy(const_cast<char*>(place(to, moved)), static_cast<const char*>(newest.data) + at * bytes,
                std::size_t(n * bytes));
}

template <bool Narrow>
void one(const RowAttentionCall& c, Size row_number, Size head, void* memory) {
    const RowPlaces& row = c.row[row_number];
    const Size groups = c.hq / c.hk, first = head * groups;
    Arena arena(memory);
    Scratch s;
    s.ldq = round_up(c.k, W), s.ldo = round_up(c.v, W), s.ldw = round_up(row.places + 1, W);
    s.q = arena.floats(groups * s.ldq), s.key = arena.floats(s.ldq), s.value = arena.floats(s.ldo);
    s.out = arena.floats(groups * s.ldo), s.weights = arena.floats(groups * s.ldw);
    const Size key_at = row_number * c.key.batch + head * c.key.head;
    const Size value_at = row_number * c.value.batch + head * c.value.head;
    for (Size g = 0; g < groups; ++g)
        read_row(s.q + g * s.ldq, c.q.data, c.q.dtype, row_number * c.q.batch + (first + g) * c.q.head, c.k, s.ldq, c.scale);
    read_row(s.key, c.key.data, c.dtype, key_at, c.k, s.ldq, 1.0f);
    read_row(s.value, c.value.data, c.dtype, value_at, c.v, s.ldo, 1.0f);
    Size g = 0;
    for (; g + 4 <= groups; g += 4) heads<Narrow, 4>(c, row, head * c.key_head, head * c.value_head, s, g);
    for (; g + 2 <= groups; g += 2) heads<Narrow, 2>(c, row, head * c.key_head, head * c.value_head, s, g);
    for (; g < groups; ++g) heads<Narrow, 1>(c, row, head * c.key_head, head * c.value_head, s, g);
    for (g = 0; g < groups; ++g)
        write_row(c.out.data, c.out.dtype, row_number * c.out.batch + (first + g) * c.out.head, s.out + g * s.ldo, c.v);
    const Size bytes = Narrow ? 2 : 4;
    keep(row.to_keys, row.keys, row.places, row.moved, c.key_place, head * c.key_head, c.key, key_at, c.k, bytes);
    keep(row.to_values, row.values, row.places, row.moved, c.value_place, head * c.value_head, c.value, value_at, c.v, bytes);
}

void run_row_attention(const RowAttentionCall& call, Size row, Size key_head, void* scratch) {
    const FlushDenormals flush;
    call.dtype == Dtype::bf16 ? one<true>(call, row, key_head, scratch) : one<false>(call, row, key_head, scratch);
}

}  // namespace

const RowAttentionKernels row_attention = {&run_row_attention};

}  // namespace linstate::LINSTATE_VARIANT
