// Products with int8 and int4 matrices: rows quantised in groups of 32, sums of a group in whole numbers, then one fused
// multiply and add a group. Whole numbers add up to the same in any order, so only the order of the groups counts: first to
// last, for any number of rows. Included after products.inl.

namespace llmctl {
namespace {

int num_groups(int inputs) { return (inputs + kQuantGroup - 1) / kQuantGroup; }

#if defined(__AVX2__) && !defined(__AVX512F__)
INLINE int32_t lanes_total(IntVec v) {
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}

INLINE uint32_t largest_lane(BitVec v) {
    __m128i four = _mm_max_epu32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
    four = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0x4e));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_max_epu32(four, _mm_shuffle_epi32(four, 0xb1))));
}
#endif

// One group of 32 numbers. With a NaN or infinity in it, its scale is that and its codes are zero, so that every product
// with the row becomes NaN; what no float16 scale could make count is zero.
INLINE void quantise_group(const float* x, signed char* codes, float* scale, int32_t* offset, float* sum) {
    constexpr int kVecs = kQuantGroup / kWidth;
    BitVec most = (BitVec)load(x) & 0x7fffffffu;  // sizes compare as their bits do, and NaN is the largest
    for (int i = 1; i < kVecs; ++i) {
        const BitVec size = (BitVec)load(x + i * kWidth) & 0x7fffffffu;
        most = size > most ? size : most;
    }
#if defined(__AVX512F__)
    const uint32_t largest = _mm512_reduce_max_epu32((__m512i)most);
#elif defined(__AVX2__)
    const uint32_t largest = largest_lane(most);
#else
    uint32_t largest = most[0];
    for (int i = 1; i < kWidth; ++i) largest = most[i] > largest ? most[i] : largest;
#endif
    const float size = as_float(largest);
    if (largest >= 0x7f800000u || size < 1e-30f) {
        memset(codes, 0, kQuantGroup);
        *scale = largest >= 0x7f800000u ? size : 0.0f;
        *offset = 0;
        *sum = 0.0f * *scale;
        return;
    }
    const Vec steps = splat(127.0f / size), magic = splat(12582912.0f);  // 1.5 * 2^23 rounds to whole numbers
    int32_t total = 0;
#if defined(__AVX512F__)
    IntVec all = splat_int(0);
    for (int i = 0; i < kVecs; ++i) {
        const IntVec code = (IntVec)((BitVec)(load(x + i * kWidth) * steps + magic) - (BitVec)magic);
        all += code;
        _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i * kWidth), _mm512_cvtepi32_epi8((__m512i)code));
    }
    total = _mm512_reduce_add_epi32((__m512i)all);
#elif defined(__AVX2__)
    __m256i code[kVecs];
    for (int i = 0; i < kVecs; ++i) code[i] = (__m256i)((BitVec)(load(x + i * kWidth) * steps + magic) - (BitVec)magic);
    total = lanes_total((IntVec)code[0] + (IntVec)code[1] + (IntVec)code[2] + (IntVec)code[3]);
    const __m256i halves = _mm256_packs_epi16(_mm256_packs_epi32(code[0], code[1]), _mm256_packs_epi32(code[2], code[3]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), _mm256_permutevar8x32_epi32(halves, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
#else
    int32_t wide[kQuantGroup];
    for (int i = 0; i < kVecs; ++i) {
        const BitVec code = (BitVec)(load(x + i * kWidth) * steps + magic) - (BitVec)magic;
        memcpy(wide + i * kWidth, &code, sizeof(code));
    }
    for (int i = 0; i < kQuantGroup; ++i) {
        codes[i] = static_cast<signed char>(wide[i]);
        total += wide[i];
    }
#endif
    *scale = size / 127.0f;
    *offset = -128 * total;
    *sum = *scale * static_cast<float>(total);
}

// The groups first <= g < last of a row. What lies beyond the row's `inputs` numbers counts as zero.
void quantise_groups(const float* x, int inputs, int first, int last, const QuantRows& rows, int row) {
    for (int g = first; g < last; ++g) {
        const size_t at = static_cast<size_t>(row) * rows.groups + g;
        const int left = inputs - g * kQuantGroup;
        const float* from = x + g * kQuantGroup;
        float padded[kQuantGroup];
        if (left < kQuantGroup) {
            for (int i = 0; i < kQuantGroup; ++i) padded[i] = i < left ? from[i] : 0.0f;
            from = padded;
        }
        quantise_group(from, rows.codes + at * kQuantGroup, rows.scales + at, rows.offsets + at, rows.sums + at);
    }
}

// How the rows that a matrix is multiplied with are rounded.
enum Rounding { kAsTheyAre, kToCodes, kToBf16 };

Rounding rounding_for(const Matrix& matrix, bool bf16_dots) {
    if (matrix.kind == kInt8 || matrix.kind == kInt4) return kToCodes;
    return matrix.kind == kBfloat16 && bf16_dots ? kToBf16 : kAsTheyAre;
}

// The groups first <= g < last of a row as bf16, to the nearest, ties to even; NaN stays NaN.
void round_groups(const float* x, int inputs, int first, int last, const QuantRows& rows, int row) {
    uint16_t* to = reinterpret_cast<uint16_t*>(rows.codes) + static_cast<size_t>(row) * rows.groups * kQuantGroup;
    const int begin = first * kQuantGroup, end = last * kQuantGroup, known = end < inputs ? end : inputs;
    for (int i = begin; i < known; ++i) {
        const uint32_t bits = as_bits(x[i]), rounded = bits + 0x7fffu + (bits >> 16 & 1u);
        to[i] = static_cast<uint16_t>(((bits & 0x7fffffffu) > 0x7f800000u ? bits | 0x400000u : rounded) >> 16);
    }
    for (int i = known; i < end; ++i) to[i] = 0;
}

// The groups first <= g < last of row `row`, rounded.
void prepare_groups(Rounding rounding, const float* x, int inputs, int first, int last, const QuantRows& rows, int row) {
    if (rounding == kToCodes) quantise_groups(x, inputs, first, last, rows, row);
    if (rounding == kToBf16) round_groups(x, inputs, first, last, rows, row);
}

void prepare_row(Rounding rounding, const float* x, int inputs, const QuantRows& rows, int row) {
    prepare_groups(rounding, x, inputs, 0, rows.groups, rows, row);
}

// Four input codes of a row, for every output.
INLINE IntVec four_codes(const signed char* codes) {
    int32_t four;
    memcpy(&four, codes, 4);
    return splat_int(four);
}

// What the integer kernels of this instruction set start from and add up. dot_plain's sums of a group (of codes 0 to 15) are
// what `widened` makes whole numbers of; dot_signed's (of int8) are whole numbers.
#if defined(__AVX512F__)

constexpr bool kAddsOffset = true;  // codes of int8 weights go in with 128 added
INLINE IntVec widened(IntVec sum) { return sum; }
INLINE IntVec dot_plain(IntVec sum, BitVec weights, IntVec x) { return (IntVec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, (__m512i)x); }
INLINE IntVec dot_signed(IntVec sum, BitVec weights, IntVec x) { return dot_plain(sum, weights, x); }

#elif defined(__AVXVNNI__)

constexpr bool kAddsOffset = true;
INLINE IntVec widened(IntVec sum) { return sum; }
INLINE IntVec dot_plain(IntVec sum, BitVec weights, IntVec x) { return (IntVec)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)weights, (__m256i)x); }
INLINE IntVec dot_signed(IntVec sum, BitVec weights, IntVec x) { return dot_plain(sum, weights, x); }

#elif defined(__AVX2__)

constexpr bool kAddsOffset = false;  // pairs of products of 255 would not fit 16 bits
INLINE IntVec widened(IntVec sum) { return (IntVec)_mm256_madd_epi16((__m256i)sum, _mm256_set1_epi16(1)); }
// in 16 bits: 8 times 2 products of 15 * 127 are a group, 30480
INLINE IntVec dot_plain(IntVec sum, BitVec weights, IntVec x) {
    return (IntVec)_mm256_add_epi16((__m256i)sum, _mm256_maddubs_epi16((__m256i)weights, (__m256i)x));
}
INLINE IntVec dot_signed(IntVec sum, BitVec weights, IntVec x) {
    const __m256i code = _mm256_xor_si256((__m256i)weights, _mm256_set1_epi8(-128));
    return sum + widened((IntVec)_mm256_maddubs_epi16(_mm256_abs_epi8(code), _mm256_sign_epi8((__m256i)x, code)));
}

#else

constexpr bool kAddsOffset = true;
INLINE IntVec widened(IntVec sum) { return sum; }
typedef int16_t Shorts __attribute__((vector_size(kWidth * 8)));
typedef uint8_t Bytes __attribute__((vector_size(kWidth * 4)));
typedef signed char SignedBytes __attribute__((vector_size(kWidth * 4)));
INLINE IntVec dot_plain(IntVec sum, BitVec weights, IntVec x) {
    // 255 * 127 fits 16 bits, the sum of two such products does not
    const Shorts product = __builtin_convertvector((Bytes)weights, Shorts) * __builtin_convertvector((SignedBytes)x, Shorts);
    for (int i = 0; i < kWidth; ++i) sum[i] += product[4 * i] + product[4 * i + 1] + product[4 * i + 2] + product[4 * i + 3];
    return sum;
}
INLINE IntVec dot_signed(IntVec sum, BitVec weights, IntVec x) { return dot_plain(sum, weights, x); }

#endif

// AVX2 has 16 registers, and compilers spend them on what can be had again: they keep every address and broadcast of a group
// (of one part for the next), and add up products only when they have all of them. `forget` hides what a pointer was made
// from; `hold` wants a sum to be there at once.
#if defined(__AVX2__) && !defined(__AVX512F__)
template <typename T>
INLINE void forget(const T*& at) {
    asm volatile("" : "+r"(at));
}
INLINE void hold(IntVec& sum) { asm("" : "+x"(sum)); }
#else
template <typename T>
INLINE void forget(const T*&) {}
INLINE void hold(IntVec&) {}
#endif

#if defined(__AVX512F__)
constexpr int kMaxQuantRows = 6;
constexpr int quant_blocks_for(int rows) { return rows == 1 ? 1 : 2; }  // 24 sums, weights and one input beside them
#elif defined(__AVX2__)
constexpr int kMaxQuantRows = 8;
constexpr int quant_blocks_for(int) { return 1; }  // 8 sums of a group, weights and one input; sums of a row are in memory
#else
constexpr int kMaxQuantRows = 2;
constexpr int quant_blocks_for(int) { return 1; }
#endif

struct QuantPacked {
    const char* weights;
    const uint16_t *scales, *minimums;
    int groups;
};

constexpr int kInt4Centred = 100;  // int4 whose minimums are -8 times the scales

// `Blocks` blocks times `Rows` rows, the groups from first to last.
template <int Type, int Blocks, int Rows>
INLINE void quant_tile(const QuantPacked& matrix, int block, const QuantRows& x, int row, Vec (&sums)[Blocks][Rows][kParts]) {
    constexpr int kUnits = Type == kInt8 ? 8 : 4;  // of 64 bytes, for a group
    const size_t groups = static_cast<size_t>(matrix.groups), block_bytes = groups * kUnits * 64;
    const char* weights = matrix.weights + block * block_bytes;
    const uint16_t* scales = matrix.scales + block * groups * kLanes;
    const uint16_t* minimums = Type == kInt4 ? matrix.minimums + block * groups * kLanes : nullptr;
    const size_t first = static_cast<size_t>(row) * groups;
    const signed char* codes = x.codes + first * kQuantGroup;
    const float *x_scales = x.scales + first, *x_sums = x.sums + first;
    const int32_t* offsets = x.offsets + first;
    for (int b = 0; b < Blocks; ++b)
        for (int r = 0; r < Rows; ++r)
            for (int p = 0; p < kParts; ++p) sums[b][r][p] = splat(0.0f);
    for (size_t g = 0; g < groups; ++g) {
        // one part after the other, so that its sums of a group stay in registers
        for (int p = 0; p < kParts; ++p) {
            const signed char* from[Rows];
            IntVec whole[Blocks][Rows];
#pragma GCC unroll 8
            for (int r = 0; r < Rows; ++r) {
                from[r] = codes + (r * groups + g) * kQuantGroup;
                forget(from[r]);
                const IntVec start = Type == kInt8 && kAddsOffset ? splat_int(offsets[r * groups + g]) : splat_int(0);
#pragma GCC unroll 4
                for (int b = 0; b < Blocks; ++b) whole[b][r] = start;
            }
#pragma GCC unroll 8
            for (int unit = 0; unit < kUnits; ++unit) {
                BitVec w[Blocks];
#pragma GCC unroll 4
                for (int b = 0; b < Blocks; ++b) {
                    const char* at = weights + b * block_bytes + g * kUnits * 64;
                    if (unit % kParts == 0) __builtin_prefetch(at + Blocks * block_bytes + (unit + p * kUnits) / kParts * 64, 0, 2);
                    w[b] = load_bits(at + unit * 64 + p * kWidth * 4);
                }
                if (Type == kInt8) {
#pragma GCC unroll 8
                    for (int r = 0; r < Rows; ++r) {
                        const IntVec input = four_codes(from[r] + unit * 4);
#pragma GCC unroll 4
                        for (int b = 0; b < Blocks; ++b) {
                            whole[b][r] = dot_signed(whole[b][r], w[b], input);
                            hold(whole[b][r]);
                        }
                    }
                } else {
                    BitVec low[Blocks], high[Blocks];
#pragma GCC unroll 4
                    for (int b = 0; b < Blocks; ++b) {
                        low[b] = w[b] & 0x0f0f0f0fu;
                        high[b] = w[b] >> 4 & 0x0f0f0f0fu;
                    }
#pragma GCC unroll 8
                    for (int r = 0; r < Rows; ++r) {
                        const IntVec input = four_codes(from[r] + unit * 4), later = four_codes(from[r] + unit * 4 + 16);
#pragma GCC unroll 4
                        for (int b = 0; b < Blocks; ++b) {
                            whole[b][r] = dot_plain(dot_plain(whole[b][r], low[b], input), high[b], later);
                            hold(whole[b][r]);
                        }
                    }
                }
            }
            forget(x_scales);
            forget(x_sums);
            forget(offsets);
            Vec scale[Blocks], minimum[Blocks];
#pragma GCC unroll 4
            for (int b = 0; b < Blocks; ++b) {
                scale[b] = load_half(scales + (b * groups + g) * kLanes + p * kWidth);
                if (Type == kInt4) minimum[b] = load_half(minimums + (b * groups + g) * kLanes + p * kWidth);
            }
#pragma GCC unroll 8
            for (int r = 0; r < Rows; ++r) {
                const Vec x_scale = splat(x_scales[r * groups + g]);
                const Vec x_sum = Type == kInt4 ? splat(x_sums[r * groups + g]) : x_scale;
                const IntVec eights = Type == kInt4Centred ? splat_int(offsets[r * groups + g] >> 4) : splat_int(0);  // -8 times the sum
#pragma GCC unroll 4
                for (int b = 0; b < Blocks; ++b) {
                    const IntVec total = Type == kInt8 ? whole[b][r] : widened(whole[b][r]) + eights;
                    sums[b][r][p] = fma(to_floats(total), scale[b] * x_scale, sums[b][r][p]);
                    if (Type == kInt4) sums[b][r][p] = fma(minimum[b], x_sum, sums[b][r][p]);
                }
            }
        }
    }
}

template <int Type, int Blocks, int Rows>
void quant_blocks_by_rows(const QuantPacked& matrix, int block, const QuantRows& x, int row, const Target& target) {
    Vec sums[Blocks][Rows][kParts];
    quant_tile<Type, Blocks, Rows>(matrix, block, x, row, sums);
    for (int b = 0; b < Blocks; ++b)
        for (int r = 0; r < Rows; ++r) put(target, row + r, block + b, sums[b][r]);
}

template <int Type, int Rows>
void quant_group_by_rows(const QuantPacked& matrix, int first, int last, const QuantRows& x, int row, const Target& target) {
    constexpr int kBlocks = quant_blocks_for(Rows);
    int block = first;
    for (; block + kBlocks <= last; block += kBlocks) quant_blocks_by_rows<Type, kBlocks, Rows>(matrix, block, x, row, target);
    for (; block < last; ++block) quant_blocks_by_rows<Type, 1, Rows>(matrix, block, x, row, target);
}

template <int Type, int Rows>
struct QuantTail {
    static void run(int left, const QuantPacked& matrix, int first, int last, const QuantRows& x, int row, const Target& target) {
        if (left == Rows)
            quant_group_by_rows<Type, Rows>(matrix, first, last, x, row, target);
        else
            QuantTail<Type, Rows - 1>::run(left, matrix, first, last, x, row, target);
    }
};

template <int Type>
struct QuantTail<Type, 0> {
    static void run(int, const QuantPacked&, int, int, const QuantRows&, int, const Target&) {}
};

template <int Type>
void quant_product(const QuantPacked& matrix, int first, int last, const QuantRows& x, int rows, const Target& target) {
    for (int panel = 0; panel < rows; panel += kPanel) {
        const int end = rows - panel < kPanel ? rows : panel + kPanel;
        for (int block = first; block < last; block += kGroup) {
            const int stop = last - block < kGroup ? last : block + kGroup;
            int row = panel;
            for (; row + kMaxQuantRows <= end; row += kMaxQuantRows)
                quant_group_by_rows<Type, kMaxQuantRows>(matrix, block, stop, x, row, target);
            QuantTail<Type, kMaxQuantRows - 1>::run(end - row, matrix, block, stop, x, row, target);
        }
    }
}

#if defined(__AVX512F__)

// For CPUs with AVX512_BF16 alone, which are asked at run time: pairs of bf16 products added to a float32 sum at once.
#define USES_BF16 __attribute__((target("avx512bf16")))

template <int Blocks, int Rows>
USES_BF16 void bf16_blocks_by_rows(const Packed& matrix, int block, const QuantRows& x, int row, const Target& target) {
    const size_t row_bytes = static_cast<size_t>(x.groups) * kQuantGroup * sizeof(uint16_t);
    const char* weights = matrix.weights + block * matrix.block_bytes;
    const char* numbers = reinterpret_cast<const char*>(x.codes) + row * row_bytes;
    Vec sums[Blocks][Rows][kParts];
    for (int b = 0; b < Blocks; ++b)
        for (int r = 0; r < Rows; ++r) sums[b][r][0] = splat(0.0f);
    for (size_t pair = 0; pair < static_cast<size_t>(matrix.inputs + 1) / 2; ++pair) {
        __m512i w[Blocks];
#pragma GCC unroll 4
        for (int b = 0; b < Blocks; ++b) {
            const char* at = weights + b * matrix.block_bytes + pair * 64;
            __builtin_prefetch(at + Blocks * matrix.block_bytes, 0, 2);
            w[b] = (__m512i)load_bits(at);
        }
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
            const __m512i input = (__m512i)four_codes(reinterpret_cast<const signed char*>(numbers + r * row_bytes + pair * 4));
#pragma GCC unroll 4
            for (int b = 0; b < Blocks; ++b)
                sums[b][r][0] = (Vec)_mm512_dpbf16_ps((__m512)sums[b][r][0], (__m512bh)w[b], (__m512bh)input);
        }
    }
    for (int b = 0; b < Blocks; ++b)
        for (int r = 0; r < Rows; ++r) put(target, row + r, block + b, sums[b][r]);
}

template <int Rows>
void bf16_group_by_rows(const Packed& matrix, int first, int last, const QuantRows& x, int row, const Target& target) {
    int block = first;
    for (; block + 2 <= last; block += 2) bf16_blocks_by_rows<2, Rows>(matrix, block, x, row, target);
    for (; block < last; ++block) bf16_blocks_by_rows<1, Rows>(matrix, block, x, row, target);
}

// Rows go by eight, four, two and one: few kernels, and each row's sums run over the inputs from first to last in all of them.
void bf16_product(const Packed& matrix, int first, int last, const QuantRows& x, int rows, const Target& target) {
    for (int block = first; block < last; block += kGroup) {
        const int stop = last - block < kGroup ? last : block + kGroup;
        int row = 0;
        for (; row + 8 <= rows; row += 8) bf16_group_by_rows<8>(matrix, block, stop, x, row, target);
        for (; row + 4 <= rows; row += 4) bf16_group_by_rows<4>(matrix, block, stop, x, row, target);
        for (; row + 2 <= rows; row += 2) bf16_group_by_rows<2>(matrix, block, stop, x, row, target);
        for (; row < rows; ++row) bf16_group_by_rows<1>(matrix, block, stop, x, row, target);
    }
}

#else

void bf16_product(const Packed&, int, int, const QuantRows&, int, const Target&) {}  // no such kernels are offered

#endif

// The blocks first <= b < last of matrix * x, for `rows` rows of x, of any kind.
void product(const Matrix& matrix, int first, int last, const Inputs& x, int rows, Target target) {
    target.bias = matrix.bias;
    target.outputs = matrix.outputs;
    const char* weights = static_cast<const char*>(matrix.weights);
    const size_t inputs = static_cast<size_t>(matrix.inputs);
    const QuantPacked quantised{weights, matrix.scales, matrix.minimums, num_groups(matrix.inputs)};
    if (matrix.kind == kFloat32)
        product<kFloat32>(Packed{weights, inputs * kLanes * 4, matrix.inputs}, first, last, x.x, x.stride, rows, target);
    else if (matrix.kind == kBfloat16 && x.bf16_dots)
        bf16_product(Packed{weights, (inputs + 1) / 2 * kLanes * 4, matrix.inputs}, first, last, x.quantised, rows, target);
    else if (matrix.kind == kBfloat16)
        product<kBfloat16>(Packed{weights, (inputs + 1) / 2 * kLanes * 4, matrix.inputs}, first, last, x.x, x.stride, rows, target);
    else if (matrix.kind == kInt8)
        quant_product<kInt8>(quantised, first, last, x.quantised, rows, target);
    else if (matrix.minimums)
        quant_product<kInt4>(quantised, first, last, x.quantised, rows, target);
    else
        quant_product<kInt4Centred>(quantised, first, last, x.quantised, rows, target);
}

// One row of a packed matrix, as floats. Codes are widened by scale * code, and that + minimum.
void row_of(const Matrix& matrix, size_t row, float* y) {
    const size_t block = row / kLanes, lane = row % kLanes, inputs = static_cast<size_t>(matrix.inputs);
    if (matrix.kind == kFloat32) {
        const float* from = static_cast<const float*>(matrix.weights) + block * inputs * kLanes + lane;
        for (size_t k = 0; k < inputs; ++k) y[k] = from[k * kLanes];
        return;
    }
    if (matrix.kind == kBfloat16) {
        const uint16_t* from = static_cast<const uint16_t*>(matrix.weights) + block * ((inputs + 1) / 2) * 2 * kLanes + lane * 2;
        for (size_t k = 0; k < inputs; ++k) y[k] = from_bf16(from[k / 2 * 2 * kLanes + k % 2]);
        return;
    }
    const size_t groups = static_cast<size_t>(num_groups(matrix.inputs)), units = matrix.kind == kInt8 ? 8 : 4;
    const uint8_t* from = static_cast<const uint8_t*>(matrix.weights) + block * groups * units * 64 + lane * 4;
    for (size_t group = 0; group < groups; ++group) {
        const size_t at = (block * groups + group) * kLanes + lane, left = inputs - group * kQuantGroup;
        const float scale = from_half(matrix.scales[at]);
        const float minimum = matrix.kind == kInt8 ? 0.0f : matrix.minimums ? from_half(matrix.minimums[at]) : -8.0f * scale;
        const uint8_t* unit = from + group * units * 64;
        float* out = y + group * kQuantGroup;
        for (size_t i = 0; i < (left < kQuantGroup ? left : kQuantGroup); ++i) {
            if (matrix.kind == kInt8) {
                out[i] = scale * static_cast<float>(unit[i / 4 * 64 + i % 4] - 128);
            } else {
                const int both = unit[i % 16 / 4 * 64 + i % 4];
                out[i] = scale * static_cast<float>(i < 16 ? both & 15 : both >> 4) + minimum;
            }
        }
    }
}

}  // namespace
}  // namespace llmctl
