// Threads that run one job together. Included by native.cpp alone.

#pragma once

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace llmctl {
namespace {

void pause_a_little() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

constexpr int kSpins = 4096;  // of some 40 ns: what two steps of decoding lie apart, with the choice of a token between them

// Threads that spin while a job runs, since a barrier comes every few microseconds, and for a moment after it, since the next
// one mostly follows; then they sleep. The caller's own thread is number 0.
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
            job_number_.fetch_add(1, std::memory_order_release);
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
            if (spins < kSpins)
                pause_a_little();
            else
                std::this_thread::yield();
        }
    }

   private:
    void serve(int thread) {
        unsigned long seen = 0;
        for (;;) {
            for (int spins = 0; spins < kSpins && job_number_.load(std::memory_order_acquire) == seen; ++spins) pause_a_little();
            if (job_number_.load(std::memory_order_acquire) == seen) {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return ending_ || job_number_.load(std::memory_order_acquire) != seen; });
                if (ending_) return;
            }
            ++seen;  // the next job waits until every thread has done this one
            job_(context_, thread);
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
    std::atomic<unsigned long> job_number_{0};
    bool ending_ = false;  // no job runs then
    alignas(64) std::atomic<int> num_arrived_{0};
    alignas(64) std::atomic<unsigned> round_{0};
};

}  // namespace
}  // namespace llmctl
