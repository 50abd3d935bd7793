#include "pool.hpp"

#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <utility>
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
        return get();
    }
    void* get() const { return data_.get(); }
};

// Tasks are dealt out in stretches, the first to the first thread: what a thread wrote in one call it is likely to read in the
// next, in its own cache. Who is done with his own takes the others' next.
struct Job {
    struct alignas(64) Stretch {
        std::atomic<Size> next{0};
        Size last = 0;
    };

    const void* context = nullptr;
    void (*run)(const void*, Size, void*) = nullptr;
    std::unique_ptr<Stretch[]> stretches;
    int threads = 0, room = 0;

    void deal(Size tasks, int to) {
        if (to > room) stretches.reset(new Stretch[std::size_t(to)]), room = to;
        threads = to;
        for (int i = 0; i < to; ++i) stretches[std::size_t(i)].next = tasks * i / to, stretches[std::size_t(i)].last = tasks * (i + 1) / to;
    }
    void take(int number, void* scratch) {
        for (int i = 0; i < threads; ++i) {
            Stretch& s = stretches[std::size_t((number + i) % threads)];
            for (Size task = s.next.fetch_add(1); task < s.last; task = s.next.fetch_add(1)) run(context, task, scratch);
        }
    }
};

// Threads of our own, where there is no team to join.
class Workers {
    static constexpr int kLooks = 1000;  // about 30 microseconds

    struct Worker {
        void* scratch = nullptr;
        std::thread thread;
    };

    std::vector<std::unique_ptr<Worker>> workers_;
    Job* job_ = nullptr;
    std::atomic<int> wanted_{0};  // workers that the job may have; 0: there is none
    alignas(64) std::atomic<unsigned> calls_{0};
    // A worker counts itself in and only then looks whether there is a job; the caller says that there is none and only then
    // waits for the count. So one of the two sees the other, and the caller waits for none that still sleeps.
    alignas(64) std::atomic<int> inside_{0};

    void serve(int index, Worker& worker) {
        unsigned seen = 0;
        for (;;) {
            for (int i = 0; i < kLooks && calls_.load() == seen; ++i) relax();
            calls_.wait(seen);
            seen = calls_.load();
            inside_.fetch_add(1);
            if (index < wanted_.load()) job_->take(index + 1, worker.scratch);
            inside_.fetch_sub(1);
        }
    }

   public:
    // The caller has scratch[0], the others those behind it.
    void run(Job& job, int threads, const std::vector<Memory>& scratch) {
        int others = threads - 1;
        for (int i = 0; i < others; ++i) {  // nobody is inside: what they read may change
            if (i == int(workers_.size())) {
                auto made = std::make_unique<Worker>();
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
            workers_[std::size_t(i)]->scratch = scratch[std::size_t(i) + 1].get();
        }
        job_ = &job;
        wanted_ = others;
        calls_.fetch_add(1);
        calls_.notify_all();
        job.take(0, scratch[0].get());
        wanted_ = 0;
        for (int i = 0; inside_.load() != 0; ++i) i < kLooks ? relax() : std::this_thread::yield();
    }
};

// A team's region begins and ends when all its threads are there. Where other processes want the same cores, one of them is
// waited for for milliseconds, a turn of the scheduler, with each call; workers of our own are waited for only while they have a
// task. So where the caller mostly waited over a stretch of time, the team is left alone for a while (measured with a process beside
// us that is busy on either core: a token of 8 layers in 216 ms on the team, in 16 on workers). A stretch, and not one call: a
// single interruption of some milliseconds comes several times a second on a quiet machine, too, and the workers are slower there.
class Pool {
    using Clock = std::chrono::steady_clock;
    static constexpr std::chrono::milliseconds kStretch{40};  // ten turns of the scheduler, about
    static constexpr std::chrono::seconds kApart{1};

    Clock::time_point apart_until_{};
    Clock::duration waited_{0}, on_team_{0};  // of this stretch
    std::mutex mutex_;
    std::vector<Memory> scratch_;  // of each thread
    Job job_;
    Workers workers_;
    long process_ = process();
    Team team_;

    // Entered with as many threads as torch enters with, whether there is work for all: libgomp ends those that a call does not
    // ask for, and makes them anew for the next one.
    // Returns how long the caller had nothing to do, and the whole.
    std::pair<Clock::duration, Clock::duration> on_team(Job& job, int threads) {
        struct Work {
            Job* job;
            const Pool* pool;
            int threads;
            Clock::duration busy{0};
        } work{&job, this, threads};
        const Clock::time_point begin = Clock::now();
        const int most = team_.most_threads();
        team_.parallel(
            [](void* p) {
                Work& w = *static_cast<Work*>(p);
                const int number = w.pool->team_.thread_number();
                if (number >= w.threads) return;
                const Clock::time_point begin = number == 0 ? Clock::now() : Clock::time_point{};
                w.job->take(number, w.pool->scratch_[std::size_t(number)].get());
                if (number == 0) w.busy = Clock::now() - begin;
            },
            &work, unsigned(most > threads ? most : threads), 0);
        const Clock::duration whole = Clock::now() - begin;
        return {whole - work.busy, whole};
    }

   public:
    void join(Team team) {
        const std::lock_guard<std::mutex> lock(mutex_);
        team_ = team;
    }

    void run(Size tasks, int threads, std::size_t scratch_bytes, const void* context, void (*function)(const void*, Size, void*)) {
        std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
        if (tasks < 2 || threads < 2 || !lock.owns_lock() || process_ != process()) {
            if (lock.owns_lock()) lock.unlock();
            thread_local Memory memory;
            void* scratch = memory.at_least(scratch_bytes);
            for (Size task = 0; task < tasks; ++task) function(context, task, scratch);
            return;
        }
        const int used = tasks < threads ? int(tasks) : threads;
        if (int(scratch_.size()) < used) scratch_.resize(std::size_t(used));
        for (int i = 0; i < used; ++i) scratch_[std::size_t(i)].at_least(scratch_bytes);
        job_.context = context, job_.run = function;
        job_.deal(tasks, used);
        if (!team_.parallel || (apart_until_ != Clock::time_point{} && Clock::now() < apart_until_)) {
            workers_.run(job_, used, scratch_);
            return;
        }
        const auto [waited, whole] = on_team(job_, used);
        waited_ += waited, on_team_ += whole;
        if (on_team_ < kStretch) return;
        if (waited_ > on_team_ / 2) apart_until_ = Clock::now() + kApart;
        waited_ = on_team_ = Clock::duration{0};
    }
};

Pool& pool() {
    static Pool& one = *new Pool;  // never destroyed: its threads are still there when the process ends
    return one;
}

}  // namespace

void pool_tasks(Size tasks, int threads, std::size_t scratch_bytes, const void* context,
                void (*run)(const void*, Size, void*)) {
    pool().run(tasks, threads, scratch_bytes, context, run);
}

void join_team(Team team) { pool().join(team); }

}  // namespace linstate
