// Vectors, packed matrix products, norms, activations and softmax for the instruction set that this file is compiled for.
//
// One rule holds everywhere: what is computed for a row depends on that row alone, and each sum is added up in one order.
// So a text's numbers are the same bits whatever else is in the batch and however its prompt was cut. Compile with
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
constexpr int kMaxRows = 8;
constexpr int blocks_for(int rows) { return rows <= 4 ? 4 : 2; }  // 32 registers: 16 sums, weights and one input beside them
#elif defined(__AVX2__)
constexpr int kWidth = 8;
constexpr int kMaxRows = 4;
constexpr int blocks_for(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }  // 16 registers
#elif defined(__aarch64__)
constexpr int kWidth = 4;
constexpr int kMaxRows = 4;
constexpr int blocks_for(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }  // 32 registers of half the width
#else
constexpr int kWidth = 4;
constexpr int kMaxRows = 2;
constexpr int blocks_for(int rows) { return rows == 1 ? 2 : 1; }
#endif
constexpr int kParts = kLanes / kWidth;  // vectors that hold the 16 outputs of a block
constexpr int kGroup = 4;                // blocks that stay in the cache while all rows of a panel pass over them
constexpr int kPanel = 64;               // rows whose inputs stay in the cache

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

// Signed bytes as floats.
INLINE Vec load_bytes(const char* from) {
#if defined(__AVX512F__)
    return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__AVX2__)
    return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
    const signed char* bytes = reinterpret_cast<const signed char*>(from);
    const IntVec codes = {bytes[0], bytes[1], bytes[2], bytes[3]};
    return __builtin_convertvector(codes, Vec);
#endif
}

INLINE float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE float from_bf16(uint16_t x) { return as_float(static_cast<uint32_t>(x) << 16); }

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

// ---- products with packed matrices

// Where the sums go: y = sums + bias, or y += multiplier * (sums + bias).
struct Target {
    float* y;
    size_t stride;
    const float* bias;
    int outputs;
    bool adds;
    float multiplier;
};

INLINE void put(const Target& target, int row, int block, Vec (&sums)[kParts]) {
    float* y = target.y + static_cast<size_t>(row) * target.stride + static_cast<size_t>(block) * kLanes;
    const float* bias = target.bias ? target.bias + static_cast<size_t>(block) * kLanes : nullptr;
    if (bias)
        for (int p = 0; p < kParts; ++p) sums[p] += load(bias + p * kWidth);
    const int left = target.outputs - block * kLanes;
    if (left >= kLanes) {
        for (int p = 0; p < kParts; ++p) {
            const Vec v = target.adds ? load(y + p * kWidth) + splat(target.multiplier) * sums[p] : sums[p];
            store(y + p * kWidth, v);
        }
        return;
    }
    float lanes[kLanes];
    for (int p = 0; p < kParts; ++p) store(lanes + p * kWidth, sums[p]);
    for (int i = 0; i < left; ++i) y[i] = target.adds ? y[i] + target.multiplier * lanes[i] : lanes[i];
}

struct Packed {
    const char* weights;
    size_t block_bytes;
    int inputs;
    const float* scales = nullptr;
    size_t scales_of_block = 0;
};

// `Blocks` blocks times `Rows` rows in registers. Each sum runs over the inputs from first to last.
template <int Type, int Blocks, int Rows>
INLINE void tile(const Packed& matrix, int block, const float* x, size_t x_stride, Vec (&sums)[Blocks][Rows][kParts]) {
    const size_t block_bytes = matrix.block_bytes;
    const char* weights = matrix.weights + block * block_bytes;
    const int inputs = matrix.inputs;
    for (int b = 0; b < Blocks; ++b)
        for (int r = 0; r < Rows; ++r)
            for (int p = 0; p < kParts; ++p) sums[b][r][p] = splat(0.0f);
    if (Type == kFloat32) {
        for (int k = 0; k < inputs; ++k) {
            Vec w[Blocks][kParts];
#pragma GCC unroll 4
            for (int b = 0; b < Blocks; ++b)
#pragma GCC unroll 4
                for (int p = 0; p < kParts; ++p)
                    w[b][p] = load(reinterpret_cast<const float*>(weights + b * block_bytes) + static_cast<size_t>(k) * kLanes + p * kWidth);
#pragma GCC unroll 8
            for (int r = 0; r < Rows; ++r) {
                const Vec input = splat(x[r * x_stride + k]);
#pragma GCC unroll 4
                for (int b = 0; b < Blocks; ++b)
#pragma GCC unroll 4
                    for (int p = 0; p < kParts; ++p) sums[b][r][p] = fma(w[b][p], input, sums[b][r][p]);
            }
        }
        return;
    }
    if (Type == kInt8) {
        const float* scales = matrix.scales + block * matrix.scales_of_block;
        for (int begin = 0; begin < inputs; begin += kQuantGroup) {
            const int end = inputs - begin < kQuantGroup ? inputs : begin + kQuantGroup;
            Vec scale[Blocks][kParts];
#pragma GCC unroll 4
            for (int b = 0; b < Blocks; ++b)
#pragma GCC unroll 4
                for (int p = 0; p < kParts; ++p)
                    scale[b][p] = load(scales + b * matrix.scales_of_block + begin / kQuantGroup * kLanes + p * kWidth);
            for (int k = begin; k < end; ++k) {
                Vec w[Blocks][kParts];
#pragma GCC unroll 4
                for (int b = 0; b < Blocks; ++b)
#pragma GCC unroll 4
                    for (int p = 0; p < kParts; ++p)
                        w[b][p] = scale[b][p] * load_bytes(weights + b * block_bytes + static_cast<size_t>(k) * kLanes + p * kWidth);
#pragma GCC unroll 8
                for (int r = 0; r < Rows; ++r) {
                    const Vec input = splat(x[r * x_stride + k]);
#pragma GCC unroll 4
                    for (int b = 0; b < Blocks; ++b)
#pragma GCC unroll 4
                        for (int p = 0; p < kParts; ++p) sums[b][r][p] = fma(w[b][p], input, sums[b][r][p]);
                }
            }
        }
        return;
    }
    int k = 0;
    for (; k + 1 < inputs; k += 2) {
        Vec even[Blocks][kParts], odd[Blocks][kParts];
#pragma GCC unroll 4
        for (int b = 0; b < Blocks; ++b)
#pragma GCC unroll 4
            for (int p = 0; p < kParts; ++p) {
                const BitVec pair = load_bits(weights + b * block_bytes + (static_cast<size_t>(k / 2) * kLanes + p * kWidth) * 4);
                even[b][p] = (Vec)(pair << 16);
                odd[b][p] = (Vec)(pair & 0xffff0000u);
            }
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
            const Vec first = splat(x[r * x_stride + k]), second = splat(x[r * x_stride + k + 1]);
#pragma GCC unroll 4
            for (int b = 0; b < Blocks; ++b)
#pragma GCC unroll 4
                for (int p = 0; p < kParts; ++p) sums[b][r][p] = fma(odd[b][p], second, fma(even[b][p], first, sums[b][r][p]));
        }
    }
    if (k == inputs) return;
    for (int b = 0; b < Blocks; ++b)
        for (int p = 0; p < kParts; ++p) {
            const BitVec pair = load_bits(weights + b * block_bytes + (static_cast<size_t>(k / 2) * kLanes + p * kWidth) * 4);
            for (int r = 0; r < Rows; ++r) sums[b][r][p] = fma((Vec)(pair << 16), splat(x[r * x_stride + k]), sums[b][r][p]);
        }
}

template <int Type, int Blocks, int Rows>
void blocks_by_rows(const Packed& matrix, int block, const float* x, size_t x_stride, int row, const Target& target) {
    Vec sums[Blocks][Rows][kParts];
    tile<Type, Blocks, Rows>(matrix, block, x + row * x_stride, x_stride, sums);
    for (int b = 0; b < Blocks; ++b)
        for (int r = 0; r < Rows; ++r) put(target, row + r, block + b, sums[b][r]);
}

template <int Type, int Rows>
void group_by_rows(const Packed& matrix, int first, int last, const float* x, size_t x_stride, int row, const Target& target) {
    constexpr int kBlocks = blocks_for(Rows);
    int block = first;
    for (; block + kBlocks <= last; block += kBlocks) blocks_by_rows<Type, kBlocks, Rows>(matrix, block, x, x_stride, row, target);
    for (; block < last; ++block) blocks_by_rows<Type, 1, Rows>(matrix, block, x, x_stride, row, target);
}

template <int Type, int Rows>
struct Tail {  // the last rows of a panel, fewer than kMaxRows
    static void run(int left, const Packed& matrix, int first, int last, const float* x, size_t x_stride, int row, const Target& target) {
        if (left == Rows)
            group_by_rows<Type, Rows>(matrix, first, last, x, x_stride, row, target);
        else
            Tail<Type, Rows - 1>::run(left, matrix, first, last, x, x_stride, row, target);
    }
};

template <int Type>
struct Tail<Type, 0> {
    static void run(int, const Packed&, int, int, const float*, size_t, int, const Target&) {}
};

template <int Type>
void product(const Packed& matrix, int first, int last, const float* x, size_t x_stride, int rows, const Target& target) {
    for (int panel = 0; panel < rows; panel += kPanel) {
        const int end = rows - panel < kPanel ? rows : panel + kPanel;
        for (int block = first; block < last; block += kGroup) {
            const int stop = last - block < kGroup ? last : block + kGroup;
            int row = panel;
            for (; row + kMaxRows <= end; row += kMaxRows) group_by_rows<Type, kMaxRows>(matrix, block, stop, x, x_stride, row, target);
            Tail<Type, kMaxRows - 1>::run(end - row, matrix, block, stop, x, x_stride, row, target);
        }
    }
}

// The blocks first <= b < last of matrix * x, for `rows` rows of x.
void product(const Matrix& matrix, int first, int last, const float* x, size_t x_stride, int rows, Target target) {
    target.bias = matrix.bias;
    target.outputs = matrix.outputs;
    const char* weights = static_cast<const char*>(matrix.weights);
    const size_t inputs = static_cast<size_t>(matrix.inputs);
    if (matrix.kind == kFloat32)
        product<kFloat32>(Packed{weights, inputs * kLanes * 4, matrix.inputs}, first, last, x, x_stride, rows, target);
    else if (matrix.kind == kInt8)
        product<kInt8>(Packed{weights, inputs * kLanes, matrix.inputs, matrix.scales, (inputs + kQuantGroup - 1) / kQuantGroup * kLanes}, first,
                       last, x, x_stride, rows, target);
    else
        product<kBfloat16>(Packed{weights, (inputs + 1) / 2 * kLanes * 4, matrix.inputs}, first, last, x, x_stride, rows, target);
}

int num_blocks(int outputs) { return (outputs + kLanes - 1) / kLanes; }

// ---- one row at a time

// The sum of a[i] * b[i] in 16 interleaved partial sums, which are then added pairwise.
float dot(const float* a, const float* b, int count) {
    Vec sums[kParts];
    for (int p = 0; p < kParts; ++p) sums[p] = splat(0.0f);
    int i = 0;
    for (; i + kLanes <= count; i += kLanes)
        for (int p = 0; p < kParts; ++p) sums[p] = fma(load(a + i + p * kWidth), load(b + i + p * kWidth), sums[p]);
    float sum = lanes_sum(sums);
    for (; i < count; ++i) sum += a[i] * b[i];
    return sum;
}

float sum_of(const float* a, int count) {
    Vec sums[kParts];
    for (int p = 0; p < kParts; ++p) sums[p] = splat(0.0f);
    int i = 0;
    for (; i + kLanes <= count; i += kLanes)
        for (int p = 0; p < kParts; ++p) sums[p] += load(a + i + p * kWidth);
    float sum = lanes_sum(sums);
    for (; i < count; ++i) sum += a[i];
    return sum;
}

void rms_norm(const float* x, const float* weight, float* y, int count, float eps) {
    const float scale = 1.0f / sqrtf(dot(x, x, count) / static_cast<float>(count) + eps);
    for (int i = 0; i < count; ++i) y[i] = x[i] * scale * weight[i];
}

void layer_norm(const float* x, const float* weight, const float* bias, float* y, int count, float eps) {
    const float mean = sum_of(x, count) / static_cast<float>(count);
    for (int i = 0; i < count; ++i) y[i] = x[i] - mean;
    const float scale = 1.0f / sqrtf(dot(y, y, count) / static_cast<float>(count) + eps);
    for (int i = 0; i < count; ++i) y[i] = y[i] * scale * weight[i];
    if (bias)
        for (int i = 0; i < count; ++i) y[i] += bias[i];
}

// The pairs (i, i + half) of one head turned by their angles.
void rotate(float* head, const float* cosines, const float* sines, int half) {
    for (int i = 0; i < half; ++i) {
        const float first = head[i], second = head[i + half];
        head[i] = first * cosines[i] - second * sines[i];
        head[i + half] = second * cosines[i] + first * sines[i];
    }
}

INLINE Vec activated(Vec x, int activation) {
    const Vec one = splat(1.0f);
    if (activation == kSilu) return x / (one + exp_of(-x));
    if (activation == kRelu) return x < splat(0.0f) ? splat(0.0f) : x;
    if (activation == kGeluTanh) {  // 0.5 x (1 + tanh(u)) = x / (1 + exp(-2 u))
        const Vec u = splat(0.7978845608f) * fma(splat(0.044715f) * x * x, x, x);
        return x / (one + exp_of(splat(-2.0f) * u));
    }
    float lanes[kWidth];
    store(lanes, x);
    for (int i = 0; i < kWidth; ++i) lanes[i] = 0.5f * lanes[i] * (1.0f + erff(lanes[i] * 0.70710678f));
    return load(lanes);
}

// y = act(y), or y = act(y) * other. `count` is a multiple of 16.
void activate(float* y, const float* other, int count, int activation) {
    for (int i = 0; i < count; i += kWidth) {
        const Vec v = activated(load(y + i), activation);
        store(y + i, other ? v * load(other + i) : v);
    }
}

void soft_cap(float* x, int count, float cap) {
    for (int i = 0; i < count; ++i) x[i] = cap * tanhf(x[i] / cap);
}

// scores -> exp(scale * score - largest); returns 1 / their sum.
float softmax(float* scores, int count, float scale, float cap) {
    for (int i = 0; i < count; ++i) scores[i] *= scale;
    if (cap > 0) soft_cap(scores, count, cap);
    float largest = scores[0];
    int i = 0;
    if (count >= kWidth) {
        Vec most = load(scores);
        for (i = kWidth; i + kWidth <= count; i += kWidth) {
            const Vec v = load(scores + i);
            most = v > most ? v : most;
        }
        float lanes[kWidth];
        store(lanes, most);
        for (int j = 0; j < kWidth; ++j) largest = lanes[j] > largest ? lanes[j] : largest;
    }
    for (; i < count; ++i) largest = scores[i] > largest ? scores[i] : largest;
    const Vec shift = splat(largest);
    Vec sums[kParts];
    for (int p = 0; p < kParts; ++p) sums[p] = splat(0.0f);
    for (i = 0; i + kLanes <= count; i += kLanes)
        for (int p = 0; p < kParts; ++p) {
            const Vec v = exp_of(load(scores + i + p * kWidth) - shift);
            store(scores + i + p * kWidth, v);
            sums[p] += v;
        }
    float sum = lanes_sum(sums);
    for (; i < count; ++i) {
        float lanes[kWidth];
        store(lanes, exp_of(splat(scores[i] - largest)));
        scores[i] = lanes[0];
        sum += lanes[0];
    }
    return 1.0f / sum;
}

}  // namespace
}  // namespace llmctl
