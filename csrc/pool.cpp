#include "pool.hpp"

#include <atomic>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace linstate {
namespace {

inline void relax() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

long process() {
#if defined(__unix__) || defined(__APPLE__)
    return long(getpid());
#else
    return 0;
#endif
}

// 64-byte aligned, grows only.
class Memory {
    struct Release {
        void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
    };
    std::unique_ptr<void, Release> data_;
    std::size_t size_ = 0;

   public:
    void* at_least(std::size_t bytes) {
        if (bytes > size_ || !data_) {
            const std::size_t size = (bytes + 4095) / 4096 * 4096 + 4096;
            data_.reset();
            size_ = 0;
            data_.reset(::operator new(size, std::align_val_t(64)));
            size_ = size;
        }
        return data_.get();
    }
};

struct Job {
    Size tasks = 0;
    const void* context = nullptr;
    void (*run)(const void*, Size, void*) = nullptr;
};

class Pool {
    static constexpr int kLooks = 1000;  // about 30 microseconds

    struct Worker {
        Memory memory;
        std::thread thread;
    };

    std::mutex mutex_;
    Memory own_;
    std::vector<std::unique_ptr<Worker>> workers_;
    long process_ = process();
    Job job_;
    std::atomic<int> wanted_{0};  // workers that the job may have; 0: there is none
    alignas(64) std::atomic<unsigned> calls_{0};
    alignas(64) std::atomic<Size> next_{0};
    // A worker counts itself in and only then looks whether there is a job; the caller says that there is none and only then
    // waits for the count. So one of the two sees the other, and the caller waits for none that still sleeps.
    alignas(64) std::atomic<int> inside_{0};

    void take(void* scratch) {
        for (Size task = next_.fetch_add(1); task < job_.tasks; task = next_.fetch_add(1)) job_.run(job_.context, task, scratch);
    }

    void serve(int index, Worker& worker) {
        unsigned seen = 0;
        for (;;) {
            for (int i = 0; i < kLooks && calls_.load() == seen; ++i) relax();
            calls_.wait(seen);
            seen = calls_.load();
            inside_.fetch_add(1);
            if (index < wanted_.load()) take(worker.memory.at_least(0));
            inside_.fetch_sub(1);
        }
    }

   public:
    void run(Size tasks, int threads, std::size_t scratch_bytes, const void* context, void (*function)(const void*, Size, void*)) {
        std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
        if (tasks < 2 || threads < 2 || !lock.owns_lock() || process_ != process()) {
            thread_local Memory memory;
            void* scratch = memory.at_least(scratch_bytes);
            for (Size task = 0; task < tasks; ++task) function(context, task, scratch);
            return;
        }
        void* scratch = own_.at_least(scratch_bytes);
        int others = tasks < threads ? int(tasks) - 1 : threads - 1;
        for (int i = 0; i < others; ++i) {  // nobody is inside: their memory may change
            if (i == int(workers_.size())) {
                auto made = std::make_unique<Worker>();
                made->memory.at_least(scratch_bytes);
                try {
                    Worker& worker = *made;
                    made->thread = std::thread([this, i, &worker] { serve(i, worker); });
                } catch (const std::system_error&) {  // the system gives no more threads
                    others = i;
                    break;
                }
                made->thread.detach();
                workers_.push_back(std::move(made));
            }
            workers_[std::size_t(i)]->memory.at_least(scratch_bytes);
        }
        job_ = {tasks, context, function};
        next_ = 0;
        wanted_ = others;
        calls_.fetch_add(1);
        calls_.notify_all();
        take(scratch);
        wanted_ = 0;
        for (int i = 0; inside_.load() != 0; ++i) i < kLooks ? relax() : std::this_thread::yield();
    }
};

}  // namespace

void pool_tasks(Size tasks, int threads, std::size_t scratch_bytes, const void* context,
                void (*run)(const void*, Size, void*)) {
    static Pool& pool = *new Pool;  // never destroyed: its threads are still there when the process ends
    pool.run(tasks, threads, scratch_bytes, context, run);
}

}  // namespace linstate
