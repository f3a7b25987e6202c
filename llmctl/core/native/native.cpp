// The C interface: choice of the instruction set, threads, packing, and steps cut into chunks of tokens.

#include "native.h"

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace llmctl {
namespace {

bool can_run(const Kernels& kernels) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (&kernels == &kAvx2Kernels) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (&kernels == &kAvx512Kernels)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma");
#endif
    return &kernels == &kBaselineKernels;
}

const Kernels* const kAll[] = {  // the best first
#if defined(__x86_64__)
    &kAvx512Kernels, &kAvx2Kernels,
#endif
    &kBaselineKernels};

// The kernels called `name`, or the best ones for null. Null when there are none of that name or the CPU lacks them.
const Kernels* find_kernels(const char* name) {
    for (const Kernels* kernels : kAll)
        if ((!name || std::strcmp(kernels->name, name) == 0) && can_run(*kernels)) return kernels;
    return nullptr;
}

void pause_a_little() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Threads that spin while a job runs, since a barrier comes every few microseconds, and sleep between jobs. The caller's
// own thread is number 0.
class Pool {
   public:
    explicit Pool(int num_threads) : num_threads_(num_threads) {
        try {
            for (int i = 1; i < num_threads; ++i) threads_.emplace_back([this, i] { serve(i); });
        } catch (...) {
            end();
            throw;
        }
    }
    ~Pool() { end(); }
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int num_threads() const { return num_threads_; }

    // Run job(context, thread) on every thread; returns when all are done.
    void run(void (*job)(const void*, int), const void* context) {
        if (num_threads_ > 1) {
            std::lock_guard<std::mutex> lock(mutex_);
            job_ = job;
            context_ = context;
            ++job_number_;
            wake_.notify_all();
        }
        job(context, 0);
        barrier();
    }

    void barrier() {
        if (num_threads_ == 1) return;
        const unsigned round = round_.load(std::memory_order_relaxed);
        if (num_arrived_.fetch_add(1, std::memory_order_acq_rel) == num_threads_ - 1) {
            num_arrived_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
            return;
        }
        // yielding after a while costs little where each thread has a core, and much is won where it has not
        for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
            if (spins < 4096)
                pause_a_little();
            else
                std::this_thread::yield();
        }
    }

   private:
    void serve(int thread) {
        unsigned long seen = 0;
        for (;;) {
            void (*job)(const void*, int);
            const void* context;
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return ending_ || job_number_ != seen; });
                if (ending_) return;
                seen = job_number_;
                job = job_;
                context = context_;
            }
            job(context, thread);
            barrier();
        }
    }

    void end() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            ending_ = true;
        }
        wake_.notify_all();
        for (std::thread& thread : threads_) thread.join();
        threads_.clear();
    }

    const int num_threads_;
    std::vector<std::thread> threads_;
    std::mutex mutex_;
    std::condition_variable wake_;
    void (*job_)(const void*, int) = nullptr;
    const void* context_ = nullptr;
    unsigned long job_number_ = 0;
    bool ending_ = false;
    alignas(64) std::atomic<int> num_arrived_{0};
    alignas(64) std::atomic<unsigned> round_{0};
};

size_t whole_blocks(int64_t count) { return static_cast<size_t>((count + kLanes - 1) / kLanes * kLanes); }

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
            if (posix_memalign(&fresh, 64, count * sizeof(float)) != 0) throw std::bad_alloc();
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

Scratch lay_out(Session& session, const Model& model, const Step& step, int64_t num_tokens) {
    int64_t longest = 0;
    for (int64_t t = 0; t < step.num_tokens; ++t) longest = step.positions[t] > longest ? step.positions[t] : longest;
    Scratch scratch{};
    scratch.hidden_stride = whole_blocks(model.hidden_size);
    scratch.qkv_stride = whole_blocks((static_cast<int64_t>(model.num_heads) + 2 * model.num_kv_heads) * model.head_dim);
    scratch.attended_stride = whole_blocks(static_cast<int64_t>(model.num_heads) * model.head_dim);
    scratch.mlp_stride = whole_blocks(model.mlp_size);
    const int64_t sharing = model.num_heads / model.num_kv_heads;
    scratch.scores_stride = whole_blocks(sharing * static_cast<int64_t>(whole_blocks(longest + 1) + kLanes + 1));
    const size_t rows = static_cast<size_t>(num_tokens);
    const size_t sizes[] = {rows * scratch.hidden_stride,   rows * scratch.hidden_stride, rows * scratch.qkv_stride,
                            rows * scratch.attended_stride, rows * scratch.mlp_stride,    rows * scratch.mlp_stride,
                            scratch.scores_stride * session.pool.num_threads()};
    size_t total = 0;
    for (size_t size : sizes) total += size;
    float* at = session.memory.get(total);
    float** const places[] = {&scratch.hidden, &scratch.normed, &scratch.qkv, &scratch.attended, &scratch.gate, &scratch.up, &scratch.scores};
    for (int i = 0; i < 7; ++i) {
        *places[i] = at;
        at += sizes[i];
    }
    return scratch;
}

void run_step(Session& session, const Model& model, const Step& step) {
    const int64_t most = step.num_tokens < kChunk ? step.num_tokens : kChunk;
    const Scratch scratch = lay_out(session, model, step, most);
    float* logits = step.logits;
    for (int64_t first = 0; first < step.num_tokens; first += kChunk) {
        Step part = step;
        part.num_tokens = step.num_tokens - first < kChunk ? step.num_tokens - first : kChunk;
        part.tokens += first;
        part.positions += first;
        part.slots += first;
        part.wants_logits += first;
        part.logits = logits;
        const ChunkJob job{session.kernels,
                           Chunk{&model, &part, scratch, session.pool.num_threads(), [](void* pool) { static_cast<Pool*>(pool)->barrier(); },
                                 &session.pool}};
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

// The rows of the blocks first <= b < last. Tiles of 64 columns keep the 16 rows of a block in the cache, and the
// columns of a transposed source too.
template <typename From, typename To>
void pack_blocks(const PackJob& job, int64_t first, int64_t last) {
    constexpr int64_t kPair = sizeof(To) == 2 ? 2 : 1;  // inputs of one output that lie side by side
    const From* source = static_cast<const From*>(job.source);
    const int64_t end_row = job.first_row + job.rows, block_size = (job.columns + kPair - 1) / kPair * kPair * kLanes;
    for (int64_t block = first; block < last; ++block) {
        const int64_t from = block * kLanes > job.first_row ? block * kLanes : job.first_row;
        const int64_t to = (block + 1) * kLanes < end_row ? (block + 1) * kLanes : end_row;
        for (int64_t tile = 0; tile < job.columns; tile += 64) {
            const int64_t stop = tile + 64 < job.columns ? tile + 64 : job.columns;
            for (int64_t row = from; row < to; ++row) {
                const From* in = source + (row - job.first_row) * job.row_stride;
                To* out = static_cast<To*>(job.packed) + block * block_size + row % kLanes * kPair;
                for (int64_t k = tile; k < stop; ++k) convert(in[k * job.column_stride], out[k / kPair * kPair * kLanes + k % kPair]);
            }
        }
    }
}

struct MultiplyJob {
    const Kernels* kernels;
    const Matrix* matrix;
    const float* x;
    int rows;
    float* y;
    int num_threads;
};

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

// Rows of a matrix (rows, columns) of float32 or bf16 into `packed`, which was zeroed, as its output rows first_row and on.
EXPORTED void llmctl_pack(void* session, int32_t kind, void* packed, int64_t first_row, int64_t rows, int64_t columns, const void* source,
                 int32_t source_kind, int64_t row_stride, int64_t column_stride) {
    Pool& pool = static_cast<Session*>(session)->pool;
    const auto pack = kind == kFloat32 ? (source_kind == kFloat32 ? pack_blocks<float, float> : pack_blocks<uint16_t, float>)
                                       : (source_kind == kFloat32 ? pack_blocks<float, uint16_t> : pack_blocks<uint16_t, uint16_t>);
    const PackJob job{source, row_stride, column_stride, packed, first_row, rows, columns, pack, pool.num_threads()};
    pool.run(
        [](const void* context, int thread) {
            const PackJob& job = *static_cast<const PackJob*>(context);
            const int64_t first = job.first_row / kLanes, count = (job.first_row + job.rows + kLanes - 1) / kLanes - first;
            job.pack(job, first + count * thread / job.num_threads, first + count * (thread + 1) / job.num_threads);
        },
        &job);
}

// y (rows, outputs) = x (rows, inputs) * matrix + bias.
EXPORTED void llmctl_multiply(void* session, const Matrix* matrix, const float* x, int32_t rows, float* y) {
    Session& owner = *static_cast<Session*>(session);
    const MultiplyJob job{owner.kernels, matrix, x, rows, y, owner.pool.num_threads()};
    owner.pool.run(
        [](const void* context, int thread) {
            const MultiplyJob& job = *static_cast<const MultiplyJob*>(context);
            const int blocks = (job.matrix->outputs + kLanes - 1) / kLanes;
            const int first = static_cast<int>(static_cast<int64_t>(blocks) * thread / job.num_threads);
            const int last = static_cast<int>(static_cast<int64_t>(blocks) * (thread + 1) / job.num_threads);
            job.kernels->multiply(*job.matrix, first, last, job.x, static_cast<size_t>(job.matrix->inputs), job.rows, job.y,
                                  static_cast<size_t>(job.matrix->outputs));
        },
        &job);
}

}  // extern "C"
