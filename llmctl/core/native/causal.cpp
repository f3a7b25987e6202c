// Causal attention for training in float32, forward and backward, for x86-64 with AVX2 and FMA (-mavx2 -mfma -mf16c).
//
// One (row, key-value head) is one piece of work, so that no two threads add to the same numbers and the result does not
// depend on their count. Queries pass in blocks of kBlock; a block's probabilities stay in the cache, and the backward pass
// computes them anew from the logarithms of softmax's denominators (Dao et al. 2022), so that no square of the text's length
// is kept. What a query does not see is skipped in tiles of 6 queries times 16 keys.

#if defined(__AVX2__)

#include <stddef.h>
#include <stdint.h>

#include "vectors.inl"

namespace llmctl {
namespace {

constexpr int kTile = 6;     // rows of a tile: 12 registers of sums, beside two of numbers and one of an input
constexpr int kBlock = 48;   // queries of a block
constexpr int kSlack = 32;   // numbers beyond a row of probabilities that a tile may write

struct View {  // (rows, heads, tokens, size), in numbers from one to the next; the numbers of a head lie side by side
    float* data;
    int64_t row, head, token;

    float* at(int64_t r, int64_t h) const { return data + r * row + h * head; }
};

}  // namespace

struct CausalAttention {
    int64_t rows, heads, shared, tokens, size;  // shared: key-value heads; size: a multiple of 16
    int64_t window;                             // keys that a query sees, its own included
    View q, k, v, out, grad_out, grad_q, grad_k, grad_v;
    float* log_norms;  // (rows, heads, tokens)
    float* scratch;    // scratch_floats numbers for each thread
    int64_t scratch_floats;
    int64_t num_threads;
    float scale;
    int32_t unused;
};

namespace {

// Which numbers of the left matrix a tile reads: row r at step k is a[r * stride + k], or a[r + k * stride].
enum class Left { kRows, kColumns };

// c (Rows, 16) = or += left * b, b (depth, 16) side by side. Each sum runs over k from first to last.
template <int Rows, Left Kind>
INLINE void tile(int depth, const float* a, ptrdiff_t stride, const float* b, float* c, ptrdiff_t c_stride, bool adds) {
    Vec sums[Rows][kParts];
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r)
        for (int p = 0; p < kParts; ++p) sums[r][p] = splat(0.0f);
#pragma GCC unroll 2
    for (int k = 0; k < depth; ++k) {
        Vec numbers[kParts];
        for (int p = 0; p < kParts; ++p) numbers[p] = load(b + p * kWidth);
#pragma GCC unroll 6
        for (int r = 0; r < Rows; ++r) {
            const Vec x = splat(Kind == Left::kRows ? a[r * stride] : a[r]);
            for (int p = 0; p < kParts; ++p) sums[r][p] = fma(x, numbers[p], sums[r][p]);
        }
        a += Kind == Left::kRows ? 1 : stride;
        b += kLanes;
    }
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r)
        for (int p = 0; p < kParts; ++p) {
            float* to = c + r * c_stride + p * kWidth;
            store(to, adds ? load(to) + sums[r][p] : sums[r][p]);
        }
}

template <Left Kind>
void tile_of(int rows, int depth, const float* a, ptrdiff_t stride, const float* b, float* c, ptrdiff_t c_stride, bool adds) {
    switch (rows) {
        case 1: return tile<1, Kind>(depth, a, stride, b, c, c_stride, adds);
        case 2: return tile<2, Kind>(depth, a, stride, b, c, c_stride, adds);
        case 3: return tile<3, Kind>(depth, a, stride, b, c, c_stride, adds);
        case 4: return tile<4, Kind>(depth, a, stride, b, c, c_stride, adds);
        case 5: return tile<5, Kind>(depth, a, stride, b, c, c_stride, adds);
        default: return tile<6, Kind>(depth, a, stride, b, c, c_stride, adds);
    }
}

constexpr int least(int a, int b) { return a < b ? a : b; }
constexpr int most(int a, int b) { return a > b ? a : b; }

// x (tokens, size) as the right side of a product over tokens: [size / 16][tokens][16].
void pack_over_tokens(const float* x, ptrdiff_t stride, int tokens, int size, float* to) {
    for (int d = 0; d < size; d += kLanes)
        for (int t = 0; t < tokens; ++t, to += kLanes)
            for (int p = 0; p < kParts; ++p) store(to + p * kWidth, load(x + t * stride + d + p * kWidth));
}

// 8 rows of 8 numbers, transposed.
INLINE void transpose(const float* from, ptrdiff_t stride, float* to) {
    __m256 pairs[8], fours[8];
    for (int i = 0; i < 8; i += 2) {
        const __m256 even = _mm256_loadu_ps(from + i * stride), odd = _mm256_loadu_ps(from + (i + 1) * stride);
        pairs[i] = _mm256_unpacklo_ps(even, odd);
        pairs[i + 1] = _mm256_unpackhi_ps(even, odd);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; ++j) {
            fours[i + 2 * j] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0x44);
            fours[i + 2 * j + 1] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0xee);
        }
    for (int i = 0; i < 4; ++i) {
        _mm256_storeu_ps(to + i * kLanes, _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20));
        _mm256_storeu_ps(to + (i + 4) * kLanes, _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31));
    }
}

// x (tokens, size) as the right side of a product over size: [tokens / 16][size][16], zeros beyond the last token.
void pack_over_size(const float* x, ptrdiff_t stride, int tokens, int size, float* to) {
    for (int first = 0; first < tokens; first += kLanes, to += static_cast<size_t>(size) * kLanes) {
        if (first + kLanes <= tokens) {
            for (int d = 0; d < size; d += 8)
                for (int half = 0; half < kLanes; half += 8) transpose(x + (first + half) * stride + d, stride, to + d * kLanes + half);
            continue;
        }
        for (int t = 0; t < kLanes; ++t)
            for (int d = 0; d < size; ++d) to[d * kLanes + t] = first + t < tokens ? x[(first + t) * stride + d] : 0.0f;
    }
}

struct Block {  // queries start..start + rows - 1, which see keys from `first` on
    int start, rows, first, window;

    int end() const { return start + rows; }
    int first_key(int query) const { return most(0, query - window + 1); }
};

Block block_at(const CausalAttention& a, int start) {
    const int rows = least(kBlock, static_cast<int>(a.tokens) - start);
    const int window = static_cast<int>(a.window);
    return {start, rows, most(0, start - window + 1) / kLanes * kLanes, window};
}

// to (rows, stride): x (rows, size) times the packed keys that a tile's queries see.
void products(const Block& block, const float* x, ptrdiff_t x_stride, const float* packed, int size, float* to, ptrdiff_t stride) {
    for (int key = block.first; key < block.end(); key += kLanes) {
        const float* panel = packed + static_cast<size_t>(key) * size;
        for (int r = 0; r < block.rows; r += kTile) {
            const int rows = least(kTile, block.rows - r);
            if (key < block.start + r + rows)
                tile_of<Left::kRows>(rows, size, x + r * x_stride, x_stride, panel, to + r * stride + key, stride, false);
        }
    }
}

// to (rows of queries, size) = weights (rows, stride) times x, packed over tokens.
void weighted(const Block& block, const float* weights, ptrdiff_t stride, const float* packed, int tokens, int size, float* to,
              ptrdiff_t to_stride) {
    for (int d = 0; d < size; d += kLanes) {
        const float* panel = packed + static_cast<size_t>(d) * tokens + static_cast<size_t>(block.first) * kLanes;
        for (int r = 0; r < block.rows; r += kTile) {
            const int rows = least(kTile, block.rows - r), depth = block.start + r + rows - block.first;
            tile_of<Left::kRows>(rows, depth, weights + r * stride + block.first, stride, panel, to + r * to_stride + d, to_stride, false);
        }
    }
}

// to (tokens, size) += weights^T times x (queries of the block, size), packed over tokens.
void spread(const Block& block, const float* weights, ptrdiff_t stride, const float* packed, int size, float* to, ptrdiff_t to_stride) {
    for (int d = 0; d < size; d += kLanes) {
        const float* panel = packed + static_cast<size_t>(d) * block.rows;
        for (int key = block.first; key < block.end(); key += kTile) {
            const int keys = least(kTile, block.end() - key);
            const int from = most(0, key - block.start);  // the queries before do not see these keys
            const int64_t until = static_cast<int64_t>(key) + keys - 1 + block.window - block.start;
            const int depth = static_cast<int>(until < block.rows ? until : block.rows) - from;
            if (depth > 0)
                tile_of<Left::kColumns>(keys, depth, weights + from * stride + key, stride, panel + from * kLanes,
                                        to + key * to_stride + d, to_stride, true);
        }
    }
}

// Zeros at the keys of a row of the block that its query does not see.
void hide(const Block& block, int query, float* row) {
    for (int key = block.first; key < block.first_key(query); ++key) row[key] = 0.0f;
    for (int key = query + 1; key < block.end() + kLanes; ++key) row[key] = 0.0f;
}

float lanes_most(const float* x, int count) {
    float found = x[0];
    int i = 0;
    if (count >= kWidth) {
        Vec best = load(x);
        for (i = kWidth; i + kWidth <= count; i += kWidth) {
            const Vec v = load(x + i);
            best = v > best ? v : best;
        }
        for (int lane = 0; lane < kWidth; ++lane) found = best[lane] > found ? best[lane] : found;
    }
    for (; i < count; ++i) found = x[i] > found ? x[i] : found;
    return found;
}

// Scores of a row become exp(scale * score - shift); the sum of them. Writes up to kWidth numbers beyond.
float exponentials(float* row, int count, float scale, float shift) {
    Vec sum = splat(0.0f);
    int i = 0;
    for (; i + kWidth <= count; i += kWidth) {
        const Vec e = exp_of(fma(load(row + i), splat(scale), splat(-shift)));
        store(row + i, e);
        sum += e;
    }
    float total = 0.0f;
    if (i < count) {
        const Vec e = exp_of(fma(load(row + i), splat(scale), splat(-shift)));
        store(row + i, e);
        for (int lane = 0; lane < count - i; ++lane) total += e[lane];
    }
    for (int lane = 0; lane < kWidth; ++lane) total += sum[lane];
    return total;
}

void forward(const CausalAttention& a, int64_t row, int64_t group, float* scratch) {
    const int tokens = static_cast<int>(a.tokens), size = static_cast<int>(a.size);
    const int64_t padded = (tokens + kLanes - 1) / kLanes * kLanes, stride = padded + kSlack;
    float *keys = scratch, *values = keys + padded * size, *weights = values + padded * size;
    pack_over_size(a.k.at(row, group), a.k.token, tokens, size, keys);
    pack_over_tokens(a.v.at(row, group), a.v.token, tokens, size, values);
    const int64_t each = a.heads / a.shared;
    for (int64_t head = group * each; head < (group + 1) * each; ++head) {
        const float* q = a.q.at(row, head);
        float* out = a.out.at(row, head);
        float* log_norms = a.log_norms + (row * a.heads + head) * tokens;
        for (int start = 0; start < tokens; start += kBlock) {
            const Block block = block_at(a, start);
            products(block, q + start * a.q.token, a.q.token, keys, size, weights, stride);
            for (int r = 0; r < block.rows; ++r) {
                const int query = start + r, first = block.first_key(query);
                float* numbers = weights + r * stride;
                const float peak = a.scale * lanes_most(numbers + first, query + 1 - first);
                const float sum = exponentials(numbers + first, query + 1 - first, a.scale, peak);
                log_norms[query] = peak + logf(sum);
                const Vec share = splat(1.0f / sum);
                for (int key = first; key <= query; key += kWidth) store(numbers + key, load(numbers + key) * share);
                hide(block, query, numbers);
            }
            weighted(block, weights, stride, values, tokens, size, out + start * a.out.token, a.out.token);
        }
    }
}

void backward(const CausalAttention& a, int64_t row, int64_t group, float* scratch) {
    const int tokens = static_cast<int>(a.tokens), size = static_cast<int>(a.size);
    const int64_t padded = (tokens + kLanes - 1) / kLanes * kLanes, stride = padded + kSlack;
    float *keys = scratch, *values = keys + padded * size, *keys_by_token = values + padded * size;
    float *weights = keys_by_token + padded * size, *slopes = weights + kBlock * stride;
    float *queries = slopes + kBlock * stride, *grads = queries + kBlock * size;
    pack_over_size(a.k.at(row, group), a.k.token, tokens, size, keys);
    pack_over_size(a.v.at(row, group), a.v.token, tokens, size, values);
    pack_over_tokens(a.k.at(row, group), a.k.token, tokens, size, keys_by_token);
    float *grad_k = a.grad_k.at(row, group), *grad_v = a.grad_v.at(row, group);
    for (int t = 0; t < tokens; ++t)
        for (int d = 0; d < size; ++d) grad_k[t * a.grad_k.token + d] = grad_v[t * a.grad_v.token + d] = 0.0f;
    const int64_t each = a.heads / a.shared;
    for (int64_t head = group * each; head < (group + 1) * each; ++head) {
        const float *q = a.q.at(row, head), *out = a.out.at(row, head), *grad_out = a.grad_out.at(row, head);
        const float* log_norms = a.log_norms + (row * a.heads + head) * tokens;
        for (int start = 0; start < tokens; start += kBlock) {
            const Block block = block_at(a, start);
            const float *q_block = q + start * a.q.token, *grad_block = grad_out + start * a.grad_out.token;
            products(block, q_block, a.q.token, keys, size, weights, stride);
            products(block, grad_block, a.grad_out.token, values, size, slopes, stride);
            for (int r = 0; r < block.rows; ++r) {
                const int query = start + r, first = block.first_key(query);
                float *numbers = weights + r * stride, *slope = slopes + r * stride;
                Vec sum = splat(0.0f);
                for (int d = 0; d < size; d += kWidth)
                    sum = fma(load(out + query * a.out.token + d), load(grad_block + r * a.grad_out.token + d), sum);
                float mean = 0.0f;
                for (int lane = 0; lane < kWidth; ++lane) mean += sum[lane];
                exponentials(numbers + first, query + 1 - first, a.scale, log_norms[query]);
                for (int key = first; key <= query; key += kWidth)
                    store(slope + key, load(numbers + key) * (load(slope + key) - splat(mean)) * splat(a.scale));
                hide(block, query, numbers);
                hide(block, query, slope);
            }
            weighted(block, slopes, stride, keys_by_token, tokens, size, a.grad_q.at(row, head) + start * a.grad_q.token, a.grad_q.token);
            pack_over_tokens(grad_block, a.grad_out.token, block.rows, size, grads);
            spread(block, weights, stride, grads, size, grad_v, a.grad_v.token);
            pack_over_tokens(q_block, a.q.token, block.rows, size, queries);
            spread(block, slopes, stride, queries, size, grad_k, a.grad_k.token);
        }
    }
}

struct Work {
    const CausalAttention* attention;
    void (*run)(const CausalAttention&, int64_t row, int64_t group, float* scratch);
    int64_t next_piece, next_thread;  // counted up atomically
};

void take(void* given) {
    Work& work = *static_cast<Work*>(given);
    const CausalAttention& a = *work.attention;
    float* scratch = a.scratch + __atomic_fetch_add(&work.next_thread, 1, __ATOMIC_RELAXED) * a.scratch_floats;
    for (;;) {
        const int64_t piece = __atomic_fetch_add(&work.next_piece, 1, __ATOMIC_RELAXED);
        if (piece >= a.rows * a.shared) return;
        work.run(a, piece / a.shared, piece % a.shared, scratch);
    }
}

}  // namespace
}  // namespace llmctl

extern "C" {

// So that a caller can tell whether its struct is this one.
__attribute__((visibility("default"))) int64_t llmctl_causal_struct_bytes() { return sizeof(llmctl::CausalAttention); }

// Numbers of scratch that one thread needs.
__attribute__((visibility("default"))) int64_t llmctl_causal_scratch(int64_t tokens, int64_t size) {
    using namespace llmctl;
    const int64_t padded = (tokens + kLanes - 1) / kLanes * kLanes;
    return 3 * padded * size + 2 * kBlock * (padded + kSlack) + 2 * kBlock * size + kLanes;
}

// Fills out and log_norms, or, with `backwards`, grad_q, grad_k and grad_v. `parallel` is GOMP_parallel of an OpenMP runtime
// that is there already, so that its threads do the work and no second pool waits beside them; null with one thread.
__attribute__((visibility("default"))) void llmctl_causal(const llmctl::CausalAttention* attention, int32_t backwards,
                                                          void (*parallel)(void (*)(void*), void*, unsigned, unsigned)) {
    using namespace llmctl;
    Work work{attention, backwards ? backward : forward, 0, 0};
    if (attention->num_threads > 1 && parallel)
        parallel(take, &work, static_cast<unsigned>(attention->num_threads), 0);
    else
        take(&work);
}

}  // extern "C"

#endif
