// Products with packed matrices whose numbers are floats, or become floats one by one: float32 and bf16 weights, and caches of
// float32, float16 and int8. Included after vectors.inl.

namespace llmctl {
namespace {

#if defined(__AVX512F__)
constexpr int kMaxRows = 8;
constexpr int blocks_for(int rows) { return rows <= 4 ? 4 : 2; }  // 32 registers: 16 sums, weights and one input beside them
#elif defined(__AVX2__)
constexpr int kMaxRows = 4;
constexpr int blocks_for(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }  // 16 registers
#elif defined(__aarch64__)
constexpr int kMaxRows = 4;
constexpr int blocks_for(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }  // 32 registers of half the width
#else
constexpr int kMaxRows = 2;
constexpr int blocks_for(int rows) { return rows == 1 ? 2 : 1; }
#endif
constexpr int kGroup = 4;   // blocks that stay in the cache while all rows of a panel pass over them
constexpr int kPanel = 64;  // rows whose inputs stay in the cache
constexpr int kAhead = 1 << 10;  // bytes of weights of floats that are fetched before they are wanted

INLINE void fetch(const char* from) { __builtin_prefetch(from + kAhead, 0, 3); }

// Where the sums go: y = sums + bias, or y += multiplier * (sums + bias), or, for `continues`, on from what is in y.
struct Target {
    float* y;
    size_t stride;
    const float* bias;
    int outputs;
    bool adds;
    float multiplier;
    bool continues;
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
};

constexpr int number_bytes(int type) { return type == kFloat32 ? 4 : type == kInt8 ? 1 : 2; }

// Numbers of one input, [input][16].
template <int Type>
INLINE Vec load_numbers(const char* from) {
    if (Type == kFloat32) return load(reinterpret_cast<const float*>(from));
    if (Type == kFloat16) return load_half(reinterpret_cast<const uint16_t*>(from));
    return load_bytes(from);
}

// `Blocks` blocks times `Rows` rows in registers. Each sum runs over the inputs from first to last.
template <int Type, int Blocks, int Rows>
INLINE void tile(const Packed& matrix, int block, const float* x, size_t x_stride, Vec (&sums)[Blocks][Rows][kParts]) {
    const size_t block_bytes = matrix.block_bytes;
    const char* weights = matrix.weights + block * block_bytes;
    const int inputs = matrix.inputs;
    if (Type != kBfloat16) {
        constexpr int kBytes = number_bytes(Type);
        for (int k = 0; k < inputs; ++k) {
            Vec w[Blocks][kParts];
#pragma GCC unroll 4
            for (int b = 0; b < Blocks; ++b) {
                const char* at = weights + b * block_bytes + static_cast<size_t>(k) * kLanes * kBytes;
                fetch(at);
#pragma GCC unroll 4
                for (int p = 0; p < kParts; ++p) w[b][p] = load_numbers<Type>(at + p * kWidth * kBytes);
            }
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
    int k = 0;
    for (; k + 1 < inputs; k += 2) {
        Vec even[Blocks][kParts], odd[Blocks][kParts];
#pragma GCC unroll 4
        for (int b = 0; b < Blocks; ++b) {
            const char* at = weights + b * block_bytes + static_cast<size_t>(k / 2) * kLanes * 4;
            fetch(at);
#pragma GCC unroll 4
            for (int p = 0; p < kParts; ++p) {
                const BitVec pair = load_bits(at + p * kWidth * 4);
                even[b][p] = (Vec)(pair << 16);
                odd[b][p] = (Vec)(pair & 0xffff0000u);
            }
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
    for (int b = 0; b < Blocks; ++b)
        for (int r = 0; r < Rows; ++r)
            for (int p = 0; p < kParts; ++p)
                sums[b][r][p] = target.continues
                                    ? load(target.y + (row + r) * target.stride + static_cast<size_t>(block + b) * kLanes + p * kWidth)
                                    : splat(0.0f);
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

// The blocks first <= b < last of matrix * x, for `rows` rows of x.
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

int num_blocks(int outputs) { return (outputs + kLanes - 1) / kLanes; }

}  // namespace
}  // namespace llmctl
