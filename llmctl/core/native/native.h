// What the parts of the library agree on: the model, one step, and the table of kernels of one instruction set.
//
// The first group of structs is filled by Python (binding.py mirrors them field by field). All pointers are the caller's.
//
// Legend: M tokens of a step, C hidden size, H heads, Hkv key-value heads, D head size, F mlp size, V vocabulary size.

#pragma once

#include <stddef.h>
#include <stdint.h>

namespace llmctl {

constexpr int32_t kAbi = 1;     // raised with every change to a struct or a function of the C interface
constexpr int kLanes = 16;      // output rows of one packed block
constexpr int kQuantGroup = 32;  // inputs that share a scale
constexpr int kChunk = 256;     // tokens that pass through all layers together: bounds the scratch memory

enum Kind : int32_t { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2 };
enum Activation : int32_t { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3 };

// A packed matrix (outputs, inputs). Block b holds the output rows 16 b .. 16 b + 15, the last one padded with zeros:
//   float32   [block][input][16]
//   bfloat16  [block][input / 2][16][2], two inputs of one output side by side, an odd last input padded with zero
//   int8      [block][input][16], and `scales` [block][input / 32, rounded up][16]: a weight is scale * code
// `bias` is padded to whole blocks, or null.
struct Matrix {
    const void* weights;
    const float* scales;
    const float* bias;
    int32_t kind;
    int32_t outputs;
    int32_t inputs;
    int32_t unused;
};

// Keys lie as [slot][Hkv][capacity / 16][D][16] and values as [slot][Hkv][D / 16, rounded up][capacity][16], so that
// attention is two products with packed matrices: scores = keys * query, result = values * probabilities.
struct Layer {
    Matrix qkv, out, gate, up, down;
    const float *attn_norm, *attn_norm_bias, *mlp_norm, *mlp_norm_bias, *q_norm, *k_norm;  // null where there is none
    float *keys, *values;
    int64_t window;   // keys that a query sees, its own included; 0: all
    int64_t rotates;  // whether queries and keys are rotated
};

struct Model {
    int32_t vocab_size, hidden_size, num_layers, num_heads, num_kv_heads, head_dim, mlp_size, rotary_size;
    int32_t activation, gated_mlp, layer_norm, embed_kind;
    float norm_eps, attention_scale, attention_softcap, logit_softcap;  // a softcap of 0 is none
    float embedding_multiplier, residual_multiplier, logit_multiplier, unused;
    const void* embed;          // (V, C), not packed; int8: (V, groups of 32 codes)
    const float* embed_scales;  // (V, groups) for int8, else null
    const float* positions;  // (max_positions, C), added to the embeddings, or null
    const float *final_norm, *final_norm_bias;
    const Layer* layers;
    int64_t cache_capacity;  // positions of a slot, a multiple of 16
    Matrix head;
};

// One call: token t goes to position positions[t] of slot slots[t]. Tokens of one slot come in the order of their positions.
struct Step {
    int64_t num_tokens;
    const int32_t *tokens, *positions, *slots;  // (M,)
    const uint8_t* wants_logits;                // (M,)
    const float *cosines, *sines;               // (positions, rotary_size / 2), or null
    float* logits;                              // (tokens that want them, V)
};

// ---- inside the library

// Memory of one chunk of tokens; rows are padded to whole blocks of 16 numbers.
struct Scratch {
    float *hidden, *normed, *qkv, *attended, *gate, *up;  // one row a token
    float* scores;                                        // one area a thread
    size_t hidden_stride, qkv_stride, attended_stride, mlp_stride, scores_stride;
};

struct Chunk {
    const Model* model;
    const Step* step;  // its pointers start at this chunk
    Scratch scratch;
    int num_threads;
    void (*barrier)(void* pool);
    void* pool;
};

// The same functions, compiled once for each instruction set.
struct Kernels {
    const char* name;
    void (*run_chunk)(const Chunk& chunk, int thread);
    // y (rows, outputs) = x (rows, inputs) * matrix + bias, for the blocks first <= b < last
    void (*multiply)(const Matrix& matrix, int first, int last, const float* x, size_t x_stride, int rows, float* y, size_t y_stride);
};

extern const Kernels kBaselineKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace llmctl
