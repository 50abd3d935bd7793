// Threads that stay, for calls so short and so many that making a thread for each (threads.hpp) would cost more than it saves:
// a decoded token is a hundred products of a row with a weight, 10 to 1,000 microseconds each.
#pragma once

#include <cstddef>

#include "kernels.hpp"

namespace linstate {

// As parallel_tasks (threads.hpp), on threads that are kept. A thread that has nothing to do looks for work for some 30
// microseconds, about as long as Python needs from one product to the next, and then sleeps until it is called. Scratch memory
// is kept too: a call that needs no more than those before it allocates nothing. One call at a time has the threads; another
// Python thread's call meanwhile, and a call in a forked child, runs on the caller alone.
void pool_tasks(Size tasks, int threads, std::size_t scratch_bytes, const void* context,
                void (*run)(const void* context, Size task, void* scratch));

}  // namespace linstate
