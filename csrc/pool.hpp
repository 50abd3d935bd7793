// Threads that stay, and work shared out to them: a decoded token is a hundred products of a row with a weight, 10 to 1,000
// microseconds each; making threads for each would cost more than it saves.
#pragma once

#include <cstddef>

#include "kernels.hpp"

namespace linstate {

// Of an OpenMP library: its GOMP_parallel, with which gcc enters a parallel region, omp_get_thread_num and omp_get_max_threads.
struct Team {
    void (*parallel)(void (*run)(void*), void* context, unsigned threads, unsigned flags) = nullptr;
    int (*thread_number)() = nullptr, (*most_threads)() = nullptr;
};

// From now on work is done by the threads of this library: those that torch has. Threads look for work for some milliseconds
// before they sleep; where torch and we have threads each, those of the one are in the way of the other's.
void join_team(Team team);

// Calls run(context, task, scratch) for every task in [0, tasks), each thread with `scratch_bytes` of its own, 64-byte
// aligned. At most `threads` threads, the caller's among them: each has its stretch of the tasks, and when that is done takes
// from the others'. Scratch memory is kept: a call that needs no more than those before it allocates nothing. One call at a time
// has the threads; another Python thread's call meanwhile, and a call in a forked child, runs on the caller alone. Without a
// team the threads are our own, who look for work for some 30 microseconds, about as long as Python needs from one product to
// the next. Throws std::bad_alloc if the scratch memory cannot be had (before any task has run).
void pool_tasks(Size tasks, int threads, std::size_t scratch_bytes, const void* context,
                void (*run)(const void* context, Size task, void* scratch));

}  // namespace linstate
