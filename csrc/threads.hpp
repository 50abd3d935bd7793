// Work on several threads without a pool: threads are made for a call that is worth it and end with it.
//
// Nothing spins, nothing is left behind that a fork could break, and several Python threads may call at once. Making a
// thread costs about 20 microseconds, so a call uses no more threads than its work is worth.
#pragma once

#include <cstddef>

#include "kernels.hpp"

namespace linstate {

// Calls run(context, task, scratch) for every task in [0, tasks), each thread with `scratch_bytes` of its own, 64-byte
// aligned. At most `threads` threads, the caller's among them. A thread takes the next task when it is done with one.
// Throws std::bad_alloc if the scratch memory cannot be had (before any task has run).
void parallel_tasks(Size tasks, int threads, std::size_t scratch_bytes, const void* context,
                    void (*run)(const void* context, Size task, void* scratch));

}  // namespace linstate
