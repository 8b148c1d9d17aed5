// Threads that share the work of one operation.
#pragma once

#include <cstdint>

namespace qnext {

// Calls body(context, task) once for every task in [0, num_tasks), on the caller and the pool's workers. Tasks start in
// order but end in any; each must write memory of its own. A call from inside a task, or while another thread uses the
// pool, runs on the caller alone. Workers watch for new work for a short while, then sleep.
void run_tasks(int64_t num_tasks, void (*body)(void* context, int64_t task), void* context);

void set_num_threads(int count);
int num_threads();
// What the calling thread asks for from now on is done by it alone: for threads that share work among themselves.
void compute_alone();

template <typename Body>
inline __attribute__((always_inline)) void parallel_for(int64_t num_tasks, Body&& body) {
  run_tasks(num_tasks, [](void* context, int64_t task) { (*static_cast<decltype(&body)>(context))(task); }, &body);
}

// Memory of the calling thread, aligned to 64 bytes, until the same slot is asked for again; grows and stays. `slot` tells
// apart what is used together: 0-7 linear and experts, 8-15 attention, 16-23 the delta rule, 24-25 tiles, 26-31 training.
void* scratch(int slot, int64_t bytes);

}  // namespace qnext
