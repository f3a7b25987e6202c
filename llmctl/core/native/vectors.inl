// Vectors of the instruction set that this file is compiled for, and the conversions that everything else is built from.
//
// One rule holds in all the .inl files: what is computed for a row depends on that row alone, and each sum is added up in
// one order. So a text's numbers are the same bits whatever else is in the batch and however its prompt was cut. Compile with
// -ffp-contract=off, so that a product and a sum are fused where `fma` says so and nowhere else. Only plain C is used
// here: an inline function of the standard library, compiled with AVX-512, could replace the baseline's copy at link time.

#include <math.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "native.h"

namespace llmctl {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
constexpr int kParts = kLanes / kWidth;  // vectors that hold the 16 outputs of a block

typedef float Vec __attribute__((vector_size(kWidth * 4)));
typedef int32_t IntVec __attribute__((vector_size(kWidth * 4)));
typedef uint32_t BitVec __attribute__((vector_size(kWidth * 4)));
typedef float LooseVec __attribute__((vector_size(kWidth * 4), aligned(4), may_alias));
typedef uint32_t LooseBits __attribute__((vector_size(kWidth * 4), aligned(2), may_alias));

#define INLINE inline __attribute__((always_inline))

INLINE Vec load(const float* from) { return *reinterpret_cast<const LooseVec*>(from); }
INLINE void store(float* to, Vec v) { *reinterpret_cast<LooseVec*>(to) = v; }
INLINE BitVec load_bits(const void* from) { return *reinterpret_cast<const LooseBits*>(from); }

INLINE Vec splat(float x) {
#if defined(__AVX512F__)
    return (Vec)_mm512_set1_ps(x);
#elif defined(__AVX2__)
    return (Vec)_mm256_set1_ps(x);
#else
    return Vec{x, x, x, x};
#endif
}

INLINE IntVec splat_int(int32_t x) {
#if defined(__AVX512F__)
    return (IntVec)_mm512_set1_epi32(x);
#elif defined(__AVX2__)
    return (IntVec)_mm256_set1_epi32(x);
#else
    return IntVec{x, x, x, x};
#endif
}

INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
    return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

INLINE Vec to_floats(IntVec v) { return __builtin_convertvector(v, Vec); }

INLINE float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint32_t as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

INLINE float from_bf16(uint16_t x) { return as_float(static_cast<uint32_t>(x) << 16); }

// Signed bytes as floats.
INLINE Vec load_bytes(const char* from) {
#if defined(__AVX512F__)
    return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__AVX2__)
    return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
    const signed char* bytes = reinterpret_cast<const signed char*>(from);
    return to_floats(IntVec{bytes[0], bytes[1], bytes[2], bytes[3]});
#endif
}

// float16 as floats, exactly.
INLINE Vec load_half(const uint16_t* from) {
#if defined(__AVX512F__)
    return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__)
    return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(__aarch64__)
    return (Vec)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from)));
#else
    const BitVec half = {from[0], from[1], from[2], from[3]};
    const BitVec size = (half & 0x7fffu) << 13;  // exponent and fraction at their places; the exponent is 112 too small
    const BitVec finite = (BitVec)((Vec)size * splat(0x1p112f));
    const BitVec beyond = size | 0x7f800000u;  // infinity and NaN
    return (Vec)((size >= 0x0f800000u ? beyond : finite) | ((half & 0x8000u) << 16));
#endif
}

INLINE float from_half(uint16_t x) {
    uint16_t lanes[kWidth] = {x};
    float wide[kWidth];
    store(wide, load_half(lanes));
    return wide[0];
}

// To the nearest float16, ties to even. What is too large becomes the largest number; infinity and NaN stay.
INLINE uint16_t to_half(float x) {
    const uint32_t bits = as_bits(x), sign = bits >> 16 & 0x8000u;
    uint32_t size = bits & 0x7fffffffu;
    if (size >= 0x7f800000u) return static_cast<uint16_t>(sign | (size > 0x7f800000u ? 0x7e00u : 0x7c00u));
    if (size < 0x38800000u)  // below the smallest normal number: adding 0.5 leaves multiples of 2^-24 in the fraction
        return static_cast<uint16_t>(sign | (as_bits(as_float(size) + 0.5f) - 0x3f000000u));
    size += 0xfffu + (size >> 13 & 1u);
    const uint32_t half = (size >> 13) - (112u << 10);
    return static_cast<uint16_t>(sign | (half > 0x7bffu ? 0x7bffu : half));
}

// `count` floats as float16.
void to_halves(const float* x, uint16_t* y, int count) {
    int i = 0;
#if defined(__AVX2__)
    for (; i + kWidth <= count; i += kWidth) {
        Vec v = load(x + i);  // as above: finite numbers stay finite
        const Vec size = (Vec)((BitVec)v & 0x7fffffffu);
        const Vec most = (Vec)((BitVec)splat(65504.0f) | ((BitVec)v & 0x80000000u));
        v = (size > splat(65504.0f)) & (size < splat(INFINITY)) ? most : v;
#if defined(__AVX512F__)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + i), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#else
        _mm_storeu_si128(reinterpret_cast<__m128i*>(y + i), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#endif
    }
#endif
    for (; i < count; ++i) y[i] = to_half(x[i]);
}

// The lanes added pairwise: first half to second half, until one is left.
INLINE float lanes_sum(const Vec (&v)[kParts]) {
    float lanes[kLanes];
    for (int p = 0; p < kParts; ++p) store(lanes + p * kWidth, v[p]);
    for (int half = kLanes / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}

// exp with a relative error below 2e-7. Below -87 it stays at about 1e-38; NaN stays NaN.
INLINE Vec exp_of(Vec x) {
    const Vec low = splat(-87.0f), high = splat(88.0f), magic = splat(12582912.0f);  // 1.5 * 2^23 rounds to whole numbers
    x = x < low ? low : x;
    x = x > high ? high : x;
    const Vec shifted = fma(x, splat(1.44269504f), magic);
    const Vec whole = shifted - magic;
    Vec rest = fma(whole, splat(-0.693359375f), x);
    rest = fma(whole, splat(2.12194440e-4f), rest);
    Vec sum = splat(1.0f / 5040);
    sum = fma(sum, rest, splat(1.0f / 720));
    sum = fma(sum, rest, splat(1.0f / 120));
    sum = fma(sum, rest, splat(1.0f / 24));
    sum = fma(sum, rest, splat(1.0f / 6));
    sum = fma(sum, rest, splat(0.5f));
    sum = fma(sum, rest, splat(1.0f));
    sum = fma(sum, rest, splat(1.0f));
    const BitVec power = (((BitVec)shifted - (BitVec)magic) + 127u) << 23;
    return sum * (Vec)power;
}

float exp_of(float x) {
    float lanes[kWidth];
    store(lanes, exp_of(splat(x)));
    return lanes[0];
}

}  // namespace
}  // namespace llmctl
