// Vectors of float32 in the width of the variant, on the vector extensions of gcc and clang.
//
// The same text serves every instruction set; the width is all that differs (LINSTATE_LANES: 4, 8, 16).
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.hpp"

#if defined(__SSE__)
#include <immintrin.h>
#endif

#if !defined(__GNUC__)
#error "the kernels need gcc or clang (on Windows: clang-cl)"
#endif

namespace linstate::LINSTATE_VARIANT {

inline constexpr int W = LINSTATE_LANES;

typedef float F __attribute__((vector_size(W * 4)));
typedef std::int32_t I __attribute__((vector_size(W * 4)));
typedef std::uint32_t U __attribute__((vector_size(W * 4)));
typedef std::uint16_t H __attribute__((vector_size(W * 2)));

#define LINSTATE_INLINE inline __attribute__((always_inline))

LINSTATE_INLINE F load(const float* p) {
    F x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
}
LINSTATE_INLINE void store(float* p, F x) { __builtin_memcpy(p, &x, sizeof x); }
// Past the caches, where the processor can; `p` is aligned to the vector. What was written so stands behind streamed() only.
LINSTATE_INLINE void store_past(float* p, F x) {
#if defined(__AVX512F__) && LINSTATE_LANES == 16
    _mm512_stream_ps(p, (__m512)x);
#elif defined(__AVX__) && LINSTATE_LANES == 8
    _mm256_stream_ps(p, (__m256)x);
#else
    store(p, x);
#endif
}
LINSTATE_INLINE void streamed() {
#if defined(__SSE__)
    _mm_sfence();
#endif
}
LINSTATE_INLINE F all(float x) { return x - F{}; }  // x - 0 is x, also for -0: folds to a broadcast
LINSTATE_INLINE F bits(U x) {
    F y;
    __builtin_memcpy(&y, &x, sizeof y);
    return y;
}
LINSTATE_INLINE U bits(F x) {
    U y;
    __builtin_memcpy(&y, &x, sizeof y);
    return y;
}
// mask lanes are all ones or all zeros
LINSTATE_INLINE F select(I mask, F yes, F no) {
    return bits((bits(yes) & (U)mask) | (bits(no) & ~(U)mask));
}
LINSTATE_INLINE F max(F a, F b) { return select(a > b, a, b); }
LINSTATE_INLINE F min(F a, F b) { return select(a < b, a, b); }

LINSTATE_INLINE float sum(F x) {  // pairwise, in one fixed order
    float part[W];
    store(part, x);
    for (int width = W / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) part[i] += part[i + width];
    return part[0];
}

// bfloat16 <-> float32; rounding to nearest even, NaN stays NaN.
LINSTATE_INLINE F load_bf16(const std::uint16_t* p) {
    H x;
    __builtin_memcpy(&x, p, sizeof x);
    return bits(__builtin_convertvector(x, U) << 16);
}
LINSTATE_INLINE U bf16_bits(F x) {  // in the lower half of each lane
    const U u = bits(x);
    const U rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    const U quiet = (u >> 16) | 0x40;
    const I nan = x != x;
    return (rounded & ~(U)nan) | (quiet & (U)nan);
}
LINSTATE_INLINE void store_bf16(std::uint16_t* p, F x) {
    const H y = __builtin_convertvector(bf16_bits(x), H);
    __builtin_memcpy(p, &y, sizeof y);
}
LINSTATE_INLINE float from_bf16(std::uint16_t x) {
    const std::uint32_t u = std::uint32_t(x) << 16;
    float y;
    std::memcpy(&y, &u, 4);
    return y;
}
LINSTATE_INLINE std::uint16_t to_bf16(float x) {
    std::uint32_t u;
    std::memcpy(&u, &x, 4);
    if (x != x) return std::uint16_t((u >> 16) | 0x40);
    return std::uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// exp to about 1 ulp in the normal range; exact 0 below -87.34 (no denormals), +inf above 88.72; NaN stays NaN.
// Cody-Waite reduction by ln 2 in two parts, polynomial of degree 6 (Taylor: the error on |r| <= ln2/2 is 1.2e-7 relative
// at degree 6 before rounding; coefficients are those of Cephes expf, minimax).
LINSTATE_INLINE F exp(F x) {
    const F magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const F clamped = min(max(x, all(-88.0f)), all(89.0f));
    const F shifted = clamped * 1.44269504088896341f + magic;
    const F n = shifted - magic;
    const F r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
    F p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const I k = __builtin_convertvector(n, I);
    // 2^k in two factors, as 2^128 is no float
    const I half = k >> 1;
    const F y = (p * bits((U)((half + 127) << 23))) * bits((U)((k - half + 127) << 23));
    const F high = select(x > 88.72283f, all(__builtin_inff()), y);
    const F low = select(x < -87.33654f, F{}, high);
    return select(x != x, x, low);
}
// 2^x for x <= 0, exactly 1 at 0 and exactly 0 below -126. With x = n + r, |r| <= 1/2, 2^r = 1 + r p(r): the relative
// error of p, 5e-7, is that of 2^x - 1 too, so a slow decay keeps its time constant over any number of tokens.
// Minimax coefficients of (2^r - 1) / r. NaN stays NaN.
LINSTATE_INLINE F decay2(F x) {
    const F magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits
    const F low = all(-127.0f);
    x = low > x ? low : x;  // there r = 0, and the exponent of 1 goes to 0: the bits of zero
    const F shifted = x + magic;
    const F r = x - (shifted - magic);
    F p = all(1.3333539245650172e-3f);
    p = p * r + 9.666245430707932e-3f;
    p = p * r + 5.550500378012657e-2f;
    p = p * r + 2.4022351205348969e-1f;
    p = p * r + 6.931471228599548e-1f;
    p = p * r + 1.0f;
    return bits(bits(p) + (bits(shifted) << 23));
}
inline constexpr float LOG2E = 1.44269504088896341f;

LINSTATE_INLINE F sigmoid(F x) {  // exp of a number <= 0 only
    const F e = decay2(bits(bits(x) | 0x80000000u) * LOG2E);
    return select(x >= 0.0f, all(1.0f), e) / (e + 1.0f);
}
LINSTATE_INLINE F silu(F x) { return x * sigmoid(x); }

// The first n (0 to W) lanes, for the end of a row.
LINSTATE_INLINE F load_part(const float* p, Size n) {
    float part[W] = {};
    for (Size i = 0; i < n; ++i) part[i] = p[i];
    return load(part);
}
LINSTATE_INLINE void store_part(float* p, F x, Size n) {
    float part[W];
    store(part, x);
    for (Size i = 0; i < n; ++i) p[i] = part[i];
}

LINSTATE_INLINE Size round_up(Size n, Size step) { return (n + step - 1) / step * step; }

// n elements from `data + at` of either type, times a factor, to float32; the rest of `padded` is filled with zeros.
LINSTATE_INLINE void read_row(float* to, const void* data, Dtype dtype, Size at, Size n, Size padded, float factor) {
    Size i = 0;
    if (dtype == Dtype::f32) {
        const float* p = static_cast<const float*>(data) + at;
        for (; i + W <= n; i += W) store(to + i, load(p + i) * factor);
        for (; i < n; ++i) to[i] = p[i] * factor;
    } else {
        const std::uint16_t* p = static_cast<const std::uint16_t*>(data) + at;
        for (; i + W <= n; i += W) store(to + i, load_bf16(p + i) * factor);
        for (; i < n; ++i) to[i] = from_bf16(p[i]) * factor;
    }
    for (; i < padded; ++i) to[i] = 0.0f;
}
LINSTATE_INLINE float read_one(const void* data, Dtype dtype, Size at) {
    return dtype == Dtype::f32 ? static_cast<const float*>(data)[at]
                               : from_bf16(static_cast<const std::uint16_t*>(data)[at]);
}
LINSTATE_INLINE void write_row(void* data, Dtype dtype, Size at, const float* from, Size n) {
    Size i = 0;
    if (dtype == Dtype::f32) {
        float* p = static_cast<float*>(data) + at;
        for (; i + W <= n; i += W) store(p + i, load(from + i));
        for (; i < n; ++i) p[i] = from[i];
    } else {
        std::uint16_t* p = static_cast<std::uint16_t*>(data) + at;
        for (; i + W <= n; i += W) store_bf16(p + i, load(from + i));
        for (; i < n; ++i) p[i] = to_bf16(from[i]);
    }
}

}  // namespace linstate::LINSTATE_VARIANT
