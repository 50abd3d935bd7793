#include "threads.hpp"

#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace linstate {

void parallel_tasks(Size tasks, int threads, std::size_t scratch_bytes, const void* context,
                    void (*run)(const void*, Size, void*)) {
    if (tasks <= 0) return;
    const std::size_t each = (scratch_bytes + 4095) / 4096 * 4096;  // no cache line, no page in common
    const Size count = threads < 1 ? 1 : (threads < tasks ? threads : tasks);
    struct Release {
        void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
    };
    std::unique_ptr<void, Release> memory(
        ::operator new(each * std::size_t(count) + 64, std::align_val_t(64)));
    std::atomic<Size> next{0};
    auto work = [&](Size index) {
        void* scratch = static_cast<char*>(memory.get()) + each * std::size_t(index);
        for (Size task = next.fetch_add(1, std::memory_order_relaxed); task < tasks;
             task = next.fetch_add(1, std::memory_order_relaxed))
            run(context, task, scratch);
    };
    std::vector<std::thread> others;
    others.reserve(std::size_t(count - 1));
    for (Size i = 1; i < count; ++i) {
        try {
            others.emplace_back(work, i);
        } catch (const std::system_error&) {  // the system gives no more threads: those that are there do the work
            break;
        }
    }
    work(0);
    for (std::thread& other : others) other.join();
}

}  // namespace linstate
