// What the parts of the library agree on: the model, one step, and the table of kernels of one instruction set.
//
// The first group of structs is filled by Python (binding.py mirrors them field by field). All pointers are the caller's.
//
// Legend: M tokens of a step, C hidden size, H heads, Hkv key-value heads, D head size, F mlp size, V vocabulary size, E experts,
// k experts that a token passes through.

#pragma once

#include <stddef.h>
#include <stdint.h>

namespace llmctl {

constexpr int32_t kAbi = 5;     // raised with every change to a struct, a layout or a function of the C interface
constexpr int kLanes = 16;      // output rows of one packed block
constexpr int kQuantGroup = 32;  // inputs that share a scale
constexpr int kChunk = 256;     // tokens that pass through all layers together: bounds the scratch memory
constexpr int kKeyBlock = 256;  // keys whose softmax is computed together
constexpr int kFewKeyBlocks = 4;  // for less, waiting once more costs more than the threads' even shares save
constexpr int kMaxTileRows = 32;  // queries that go over a block of keys together
constexpr int kMaxHeadSize = 1024;
constexpr int kFewTokens = 4;  // so many tokens are prepared by every thread for itself, which is quicker than waiting

enum Kind : int32_t { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2, kInt4 = 3, kFloat16 = 4 };  // float16: of caches only
enum Activation : int32_t { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3 };

// A packed matrix (outputs, inputs). B blocks of 16 output rows, the last one filled up with zeros; G = inputs / 32, rounded
// up. What a block holds for one step of a product lies in 64 bytes side by side: one load of AVX-512, two of AVX2.
//
//   kind      array     dtype    shape
//   float32   weights   float32  (B, inputs, 16)
//   bfloat16  weights   uint16   (B, inputs / 2 rounded up, 16, 2): two inputs of one output, a missing last one is zero
//   int8      weights   uint8    (B, 8 G, 16, 4): code + 128 of four inputs of one output
//             scales    float16  (B, G, 16)
//   int4      weights   uint8    (B, 4 G, 16, 4): byte j of unit 4 g + c holds input 32 g + 4 c + j in its low half and input
//                                32 g + 16 + 4 c + j in its high half
//             scales    float16  (B, G, 16)
//             minimums  float16  (B, G, 16), or none: each is then -8 times its scale (Q4_0 of GGUF)
//   any       bias      float32  (16 B,), or none
//
// A weight of int8 is scale * code, one of int4 scale * code + minimum. So the units of int8 and int4 are the 4-byte pieces of
// quant.py's codes, transposed within a block (int8 with each sign bit turned). Codes of inputs beyond the last mean nothing.
struct Matrix {
    const void* weights;
    const uint16_t* scales;
    const uint16_t* minimums;
    const float* bias;
    int32_t kind;
    int32_t outputs;
    int32_t inputs;
    int32_t unused;
};

struct Mlp {
    Matrix gate, up, down;  // gate is empty where there is none
};

// Keys lie as [slot][Hkv][capacity / 16][D][16] and values as [slot][Hkv][D / 16, rounded up][capacity][16], so that
// attention is two products with packed matrices: scores = keys * query, result = values * probabilities. Of kind int8 they
// are codes (int8) with a scale for each position of each head, [slot][Hkv][capacity].
struct Layer {
    Matrix qkv, out;
    Mlp mlp;             // empty where tokens are routed to experts
    Matrix router;       // (E, C)
    const Mlp* experts;  // (E,), or null
    const float *attn_norm, *attn_norm_bias, *mlp_norm, *mlp_norm_bias, *q_norm, *k_norm;  // null where there is none
    const float *attn_post_norm, *attn_post_norm_bias, *mlp_post_norm, *mlp_post_norm_bias;  // of what is added; null: none
    void *keys, *values;
    float *key_scales, *value_scales;  // null but for int8
    int64_t window;                    // keys that a query sees, its own included; 0: all
    int64_t rotates;                   // whether queries and keys are rotated: 0 no, 1 by `cosines`, or `long_cosines`, 2 by `local_cosines`
};

struct Model {
    int32_t vocab_size, hidden_size, num_layers, num_heads, num_kv_heads, head_dim, mlp_size, rotary_size;
    int32_t activation, gated_mlp, layer_norm, cache_kind;
    int32_t parallel_residual;  // x + attention(norm(x)) + mlp(norm'(x)), rather than one after the other
    int32_t whole_qk_norm;      // q_norm and k_norm are over all heads together, not over each
    int32_t num_experts, num_active_experts, expert_size;  // E, k and F of the layers with experts; 0 without any
    int32_t normalised_experts;                            // the shares of a token's experts are divided by their sum
    float norm_eps, attention_scale, attention_softcap, logit_softcap;  // a softcap of 0 is none
    float embedding_multiplier, residual_multiplier, logit_multiplier, unused;
    const float* positions;  // (max_positions, C), added to the embeddings, or null
    const float *final_norm, *final_norm_bias;
    const Layer* layers;
    int64_t cache_capacity;  // positions of a slot, a multiple of 16
    Matrix embed, head;      // the same memory where they are tied; embed has no bias
};

// One call: token t goes to position positions[t] of slot slots[t]. Tokens of one slot come in the order of their positions.
struct Step {
    int64_t num_tokens;
    const int32_t *tokens, *positions, *slots;  // (M,)
    const uint8_t* wants_logits;                // (M,)
    const float *local_cosines, *local_sines;  // of layers that rotate by another base, or null
    const float *cosines, *sines;               // (positions, rotary_size / 2), or null
    const float *long_cosines, *long_sines;     // of tokens that `is_long` marks, or null
    const uint8_t* is_long;                     // (M,), or null
    float* logits;                              // (tokens that want them, V)
};

// ---- inside the library

// Rows rounded for a product. For int8 and int4: code, scale and sums of each group of 32 inputs. For bf16 in instructions that
// multiply bf16: bf16 numbers [row][G][32] alone, in the place of `codes`.
struct QuantRows {
    signed char* codes;  // [row][G][32]; a number is about scale * code
    float* scales;       // [row][G]
    int32_t* offsets;    // [row][G], -128 * sum of the group's codes: what codes stored with 128 added bring in too much
    float* sums;         // [row][G], scale * sum of the group's codes: what a minimum is multiplied by
    int groups;
};
constexpr size_t kQuantBytes = 64 + 12;  // of one group

// Rows that enter a product: as they are for weights of floats, else rounded as the matrix and the instructions want it.
struct Inputs {
    const float* x;
    size_t stride;
    QuantRows quantised;
    bool bf16_dots;  // bf16 weights are multiplied with rows rounded to bf16
};

// Memory of one chunk of tokens; rows are padded to whole groups of 32 numbers, zeros where something reads them.
struct Scratch {
    float *hidden, *normed, *qkv, *attended, *gate, *up;  // one row a token
    float* branch;                                        // what attention or mlp adds, where it is not added at once
    float *quantised, *mlp_quantised;                     // memory of QuantRows of what enters a product
    float* attention;                                     // one area a thread
    float* partials;                                      // of attention over blocks of keys
    size_t partial_blocks;                                // of the longest text
    // of experts: logits of the router and what follows from them, one row a token; the tokens of each expert and the rows that
    // enter it, one area a thread; what it gives. `gate`, `up` and `mlp_quantised` have a row for each token and expert of it
    float *router, *shares, *expert_rows;
    int32_t *chosen, *grouping;
    float *gathered, *gathered_quantised;
    size_t hidden_stride, qkv_stride, attended_stride, mlp_stride, attention_stride, router_stride, expert_stride;
};

// Numbers that say which tokens go to which expert.
static inline size_t grouping_numbers(const Model& model, size_t num_tokens) {
    return 1 + static_cast<size_t>(model.num_experts) + 2 * num_tokens * static_cast<size_t>(model.num_active_experts);
}

// Numbers that one thread's attention needs.
static inline size_t attention_floats(const Model& model) {
    const size_t size = static_cast<size_t>(model.head_dim + kLanes - 1) / kLanes * kLanes;
    return kMaxTileRows * (3 * size + kKeyBlock + 2);
}

// Numbers that one block of keys adds to one query.
static inline size_t partial_floats(const Model& model) {
    return static_cast<size_t>(model.head_dim + kLanes - 1) / kLanes * kLanes + kLanes;
}

// Whether so few tokens go over so many keys that blocks of keys are shared out, rather than tokens and heads.
static inline bool splits_keys(const Model& model, int64_t num_tokens, int64_t key_blocks, int num_threads) {
    return num_threads > 1 && key_blocks >= kFewKeyBlocks && num_tokens * model.num_kv_heads < 4 * num_threads;
}

// Where rows of `inputs` numbers lie in memory of kQuantBytes for each group.
static inline QuantRows quant_rows(void* memory, int rows, int inputs) {
    const int groups = (inputs + kQuantGroup - 1) / kQuantGroup;
    const size_t count = static_cast<size_t>(rows) * groups;
    signed char* codes = static_cast<signed char*>(memory);
    float* numbers = reinterpret_cast<float*>(codes + count * kQuantGroup * sizeof(uint16_t));
    return {codes, numbers, reinterpret_cast<int32_t*>(numbers + count), numbers + 2 * count, groups};
}

struct Chunk {
    const Model* model;
    const Step* step;  // its pointers start at this chunk
    Scratch scratch;
    int num_threads;
    bool bf16_dots;
    void (*barrier)(void* pool);
    void* pool;
};

// The same functions, compiled once for each instruction set.
struct Kernels {
    const char* name;
    bool bf16_dots;  // AVX512_BF16: whether these kernels may use its instruction
    void (*run_chunk)(const Chunk& chunk, int thread);
    // row `row` of x rounded for `multiply`, if the matrix wants that
    void (*prepare)(const Matrix& matrix, const Inputs& x, int row);
    // y (rows, outputs) = x (rows, inputs) * matrix + bias, for the blocks first <= b < last
    void (*multiply)(const Matrix& matrix, int first, int last, const Inputs& x, int rows, float* y, size_t y_stride);
};

extern const Kernels kBaselineKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvxVnniKernels;  // without functions where the compiler knows no AVX-VNNI
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512Bf16Kernels;
#endif

}  // namespace llmctl
