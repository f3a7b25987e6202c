// The C interface: choice of the instruction set, threads, packing, and steps cut into chunks of tokens.

#include "native.h"

#include <cstdlib>
#include <cstring>
#include <new>

#include "pool.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace llmctl {
namespace {

#if defined(__x86_64__)
bool has_f16c() {  // not every compiler's __builtin_cpu_supports knows it
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx >> 29 & 1u);
}
#endif

#if defined(__x86_64__)
bool has_newer(int bit) {  // leaf 7, subleaf 1
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> bit & 1u);
}
bool has_avx_vnni() { return has_newer(4); }
bool has_bf16() { return has_newer(5); }
#endif

bool can_run(const Kernels& kernels) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (&kernels == &kAvx2Kernels) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    if (&kernels == &kAvxVnniKernels) return kernels.run_chunk && has_avx_vnni() && can_run(kAvx2Kernels);
    if (&kernels == &kAvx512Bf16Kernels) return has_bf16() && can_run(kAvx512Kernels);
    if (&kernels == &kAvx512Kernels)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma");
#endif
    return &kernels == &kBaselineKernels;
}

const Kernels* const kAll[] = {  // the best first
#if defined(__x86_64__)
    &kAvx512Bf16Kernels, &kAvx512Kernels, &kAvxVnniKernels, &kAvx2Kernels,
#endif
    &kBaselineKernels};

// The kernels called `name`, or the best ones for null. Null when there are none of that name or the CPU lacks them.
const Kernels* find_kernels(const char* name) {
    for (const Kernels* kernels : kAll)
        if ((!name || std::strcmp(kernels->name, name) == 0) && can_run(*kernels)) return kernels;
    return nullptr;
}

constexpr size_t kHugePage = 2 << 20;

// Grows and is never given back before its owner is.
class Memory {
   public:
    ~Memory() { std::free(data_); }
    float* get(size_t count) {
        if (count > count_) {
            std::free(data_);
            data_ = nullptr;
            count_ = 0;
            void* fresh = nullptr;
            const size_t bytes = count * sizeof(float), page = bytes >= kHugePage ? kHugePage : 64;
            if (posix_memalign(&fresh, page, bytes) != 0) throw std::bad_alloc();
#if defined(__linux__)
            if (page == kHugePage) madvise(fresh, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);  // a wish; if not, then not
#endif
            data_ = static_cast<float*>(fresh);
            count_ = count;
        }
        return data_;
    }

   private:
    float* data_ = nullptr;
    size_t count_ = 0;
};

// What one executor holds of the library.
struct Session {
    Session(const Kernels* kernels, int num_threads) : kernels(kernels), pool(num_threads) {}
    const Kernels* kernels;
    Pool pool;
    Memory memory;
};

struct ChunkJob {
    const Kernels* kernels;
    Chunk chunk;
};

size_t whole_groups(int64_t count) { return static_cast<size_t>((count + kQuantGroup - 1) / kQuantGroup * kQuantGroup); }

Scratch lay_out(Session& session, const Model& model, int64_t num_tokens, int64_t longest) {
    const int num_threads = session.pool.num_threads();
    const int64_t attended = static_cast<int64_t>(model.num_heads) * model.head_dim, key_values = static_cast<int64_t>(model.num_kv_heads) * model.head_dim;
    const int64_t widest = attended > model.hidden_size ? attended : model.hidden_size;
    Scratch scratch{};
    scratch.hidden_stride = whole_groups(model.hidden_size);
    scratch.qkv_stride = whole_groups(attended + 2 * key_values);
    scratch.attended_stride = whole_groups(attended);
    scratch.mlp_stride = whole_groups(model.mlp_size);
    scratch.attention_stride = whole_groups(static_cast<int64_t>(attention_floats(model)));
    scratch.router_stride = whole_groups(model.num_experts);
    scratch.expert_stride = whole_groups(model.expert_size);
    scratch.partial_blocks = static_cast<size_t>((longest + kKeyBlock - 1) / kKeyBlock);
    const size_t rows = static_cast<size_t>(num_tokens), threads = static_cast<size_t>(num_threads);
    const size_t active = static_cast<size_t>(model.num_active_experts), routed = active ? rows : 0;
    const int64_t splitting = num_tokens < kChunk ? num_tokens : kChunk;  // the last chunk may have any number of tokens
    size_t partials = 0;
    for (int64_t count = splitting; count > 0 && !partials; --count)
        if (splits_keys(model, count, static_cast<int64_t>(scratch.partial_blocks), num_threads))
            partials = static_cast<size_t>(count) * model.num_heads * scratch.partial_blocks * partial_floats(model);
    const size_t dense = rows * scratch.mlp_stride, expert = routed * active * scratch.expert_stride, inner = dense > expert ? dense : expert;
    const size_t few = static_cast<size_t>(kFewTokens) * num_threads;  // rows that each thread prepares for itself
    const size_t prepared = few > rows ? few : rows;  // a step's last chunk may be of few tokens where the others are not
    struct {
        float** place;
        size_t floats;
    } const parts[] = {
        {&scratch.hidden, rows * scratch.hidden_stride},
        {&scratch.normed, prepared * scratch.hidden_stride},
        {&scratch.qkv, rows * scratch.qkv_stride},
        {&scratch.attended, rows * scratch.attended_stride},
        {&scratch.gate, inner},
        {&scratch.up, inner},
        {&scratch.branch, rows * scratch.hidden_stride},
        {&scratch.quantised, prepared * whole_groups(widest) / kQuantGroup * kQuantBytes / sizeof(float)},
        {&scratch.mlp_quantised, inner / kQuantGroup * kQuantBytes / sizeof(float)},
        {&scratch.attention, scratch.attention_stride * threads},
        {&scratch.partials, partials},
        {&scratch.router, active ? prepared * scratch.router_stride : 0},
        {&scratch.shares, prepared * active},
        {&scratch.expert_rows, routed * scratch.hidden_stride},
        {reinterpret_cast<float**>(&scratch.chosen), prepared * active},
        {reinterpret_cast<float**>(&scratch.grouping), active ? threads * grouping_numbers(model, rows) : 0},
        {&scratch.gathered, threads * routed * scratch.hidden_stride},
        {&scratch.gathered_quantised, threads * routed * scratch.hidden_stride / kQuantGroup * kQuantBytes / sizeof(float)},
    };
    size_t total = 0;
    for (const auto& part : parts) total += whole_groups(static_cast<int64_t>(part.floats));
    float* at = session.memory.get(total);
    for (const auto& part : parts) {
        *part.place = at;
        at += whole_groups(static_cast<int64_t>(part.floats));
    }
    return scratch;
}

void run_step(Session& session, const Model& model, const Step& step) {
    const int64_t most = step.num_tokens < kChunk ? step.num_tokens : kChunk;
    int64_t longest = 0;
    for (int64_t t = 0; t < step.num_tokens; ++t) longest = step.positions[t] >= longest ? step.positions[t] + 1 : longest;
    const Scratch scratch = lay_out(session, model, most, longest);
    float* logits = step.logits;
    for (int64_t first = 0; first < step.num_tokens; first += kChunk) {
        Step part = step;
        part.num_tokens = step.num_tokens - first < kChunk ? step.num_tokens - first : kChunk;
        part.tokens += first;
        part.positions += first;
        part.slots += first;
        part.wants_logits += first;
        if (part.is_long) part.is_long += first;
        part.logits = logits;
        const auto wait = [](void* pool) { static_cast<Pool*>(pool)->barrier(); };
        const Chunk chunk{&model, &part, scratch, session.pool.num_threads(), session.kernels->bf16_dots, wait, &session.pool};
        const ChunkJob job{session.kernels, chunk};
        session.pool.run(
            [](const void* context, int thread) {
                const ChunkJob& job = *static_cast<const ChunkJob*>(context);
                job.kernels->run_chunk(job.chunk, thread);
            },
            &job);
        for (int64_t t = 0; t < part.num_tokens; ++t) logits += part.wants_logits[t] ? model.vocab_size : 0;
    }
}

float bf16_to_float(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// To the nearest, ties to even; NaN stays a NaN.
uint16_t float_to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

struct PackJob {
    const void* source;
    int64_t row_stride, column_stride;  // of the source, in numbers
    void* packed;
    int64_t first_row, rows, columns;
    void (*pack)(const PackJob& job, int64_t first, int64_t last);
    int num_threads;
};

inline void convert(float from, float& to) { to = from; }
inline void convert(float from, uint16_t& to) { to = float_to_bf16(from); }
inline void convert(uint16_t from, float& to) { to = bf16_to_float(from); }
inline void convert(uint16_t from, uint16_t& to) { to = from; }
inline void convert(uint32_t from, uint32_t& to) { to = from; }

// The rows of the blocks first <= b < last, `Pair` inputs of one output side by side. Tiles of 64 columns keep the 16 rows of
// a block in the cache, and the columns of a transposed source too.
template <typename From, typename To, int64_t Pair>
void pack_blocks(const PackJob& job, int64_t first, int64_t last) {
    const From* source = static_cast<const From*>(job.source);
    const int64_t end_row = job.first_row + job.rows, block_size = (job.columns + Pair - 1) / Pair * Pair * kLanes;
    for (int64_t block = first; block < last; ++block) {
        const int64_t from = block * kLanes > job.first_row ? block * kLanes : job.first_row;
        const int64_t to = (block + 1) * kLanes < end_row ? (block + 1) * kLanes : end_row;
        for (int64_t tile = 0; tile < job.columns; tile += 64) {
            const int64_t stop = tile + 64 < job.columns ? tile + 64 : job.columns;
            for (int64_t row = from; row < to; ++row) {
                const From* in = source + (row - job.first_row) * job.row_stride;
                To* out = static_cast<To*>(job.packed) + block * block_size + row % kLanes * Pair;
                for (int64_t k = tile; k < stop; ++k) convert(in[k * job.column_stride], out[k / Pair * Pair * kLanes + k % Pair]);
            }
        }
    }
}

using PackBlocks = void (*)(const PackJob& job, int64_t first, int64_t last);

PackBlocks packer(int32_t kind, int32_t source_kind) {
    const bool from_float = source_kind == kFloat32;
    if (kind == kFloat32) return from_float ? pack_blocks<float, float, 1> : pack_blocks<uint16_t, float, 1>;
    if (kind == kBfloat16) return from_float ? pack_blocks<float, uint16_t, 2> : pack_blocks<uint16_t, uint16_t, 2>;
    return kind == kFloat16 ? pack_blocks<uint16_t, uint16_t, 1> : pack_blocks<uint32_t, uint32_t, 1>;
}

struct MultiplyJob {
    const Kernels* kernels;
    const Matrix* matrix;
    Inputs x;
    int rows;
    float* y;
    Pool* pool;
};

void multiply(const MultiplyJob& job, int thread) {
    const int num_threads = job.pool->num_threads();
    const auto part = [&](int count, int at) { return static_cast<int>(static_cast<int64_t>(count) * at / num_threads); };
    for (int row = part(job.rows, thread); row < part(job.rows, thread + 1); ++row) job.kernels->prepare(*job.matrix, job.x, row);
    job.pool->barrier();
    const int blocks = (job.matrix->outputs + kLanes - 1) / kLanes;
    job.kernels->multiply(*job.matrix, part(blocks, thread), part(blocks, thread + 1), job.x, job.rows, job.y,
                          static_cast<size_t>(job.matrix->outputs));
}

}  // namespace
}  // namespace llmctl

using namespace llmctl;

#define EXPORTED __attribute__((visibility("default")))

extern "C" {

// What the caller's structs must agree with: the version of the interface and their sizes.
EXPORTED int64_t llmctl_abi(void) {
    return static_cast<int64_t>(kAbi) * 1000000000 + static_cast<int64_t>(sizeof(Matrix)) * 1000000 + static_cast<int64_t>(sizeof(Layer)) * 1000 +
           static_cast<int64_t>(sizeof(Model)) + static_cast<int64_t>(sizeof(Step));
}

// The kernels that `name` (or null: the best) stands for, by their name; null when this CPU cannot run them.
EXPORTED const char* llmctl_kernels(const char* name) {
    const Kernels* kernels = find_kernels(name);
    return kernels ? kernels->name : nullptr;
}

// Null when the kernels are not there, or memory or threads are short.
EXPORTED void* llmctl_open(const char* kernels_name, int32_t num_threads) {
    const Kernels* kernels = find_kernels(kernels_name);
    if (!kernels || num_threads < 1) return nullptr;
    try {
        return new Session(kernels, num_threads);
    } catch (...) {
        return nullptr;
    }
}

EXPORTED void llmctl_close(void* session) { delete static_cast<Session*>(session); }

// 0: done; 1: no memory, and nothing was written but keys and values.
EXPORTED int32_t llmctl_step(void* session, const Model* model, const Step* step) {
    try {
        run_step(*static_cast<Session*>(session), *model, *step);
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

// Rows of a matrix (rows, columns) into `packed`, which was zeroed, as its output rows first_row and on. Float32 and bf16 become
// what `kind` says; for int8 and int4 the numbers are the 4-byte units of their codes, for float16 their scales.
EXPORTED void llmctl_pack(void* session, int32_t kind, void* packed, int64_t first_row, int64_t rows, int64_t columns, const void* source,
                 int32_t source_kind, int64_t row_stride, int64_t column_stride) {
    Pool& pool = static_cast<Session*>(session)->pool;
    const PackJob job{source, row_stride, column_stride, packed, first_row, rows, columns, packer(kind, source_kind), pool.num_threads()};
    pool.run(
        [](const void* context, int thread) {
            const PackJob& job = *static_cast<const PackJob*>(context);
            const int64_t first = job.first_row / kLanes, count = (job.first_row + job.rows + kLanes - 1) / kLanes - first;
            job.pack(job, first + count * thread / job.num_threads, first + count * (thread + 1) / job.num_threads);
        },
        &job);
}

// y (rows, outputs) = x (rows, inputs) * matrix + bias. 0: done; 1: no memory.
EXPORTED int32_t llmctl_multiply(void* session, const Matrix* matrix, const float* x, int32_t rows, float* y) {
    Session& owner = *static_cast<Session*>(session);
    try {
        const size_t bytes = static_cast<size_t>(rows) * whole_groups(matrix->inputs) / kQuantGroup * kQuantBytes;
        const QuantRows quantised = quant_rows(owner.memory.get(bytes / sizeof(float)), rows, matrix->inputs);
        const MultiplyJob job{owner.kernels, matrix, {x, static_cast<size_t>(matrix->inputs), quantised, owner.kernels->bf16_dots}, rows, y, &owner.pool};
        owner.pool.run([](const void* context, int thread) { multiply(*static_cast<const MultiplyJob*>(context), thread); }, &job);
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

}  // extern "C"
