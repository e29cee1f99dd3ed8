// Threads for the kernels.  Which thread runs a task never changes a result: every task writes its own part of the
// output.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#ifdef MOERT_STD_THREAD  // for the thread sanitizer, which cannot see into libgomp's barriers
#include <thread>
#include <vector>
#endif

namespace moert::cpu {

// f(task) for every task in [0, tasks), on at most `threads` threads; a free thread takes the next task in order.
template <typename F>
void parallel_for(int64_t tasks, int64_t threads, const F& f) {
  threads = std::min(threads, tasks);
  if (threads <= 1) {
    for (int64_t task = 0; task < tasks; ++task) f(task);
    return;
  }
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) f(task);
  };
#ifdef MOERT_STD_THREAD
  std::vector<std::thread> pool;
  for (int64_t i = 1; i < threads; ++i) pool.emplace_back(work);
  work();
  for (auto& thread : pool) thread.join();
#else
#pragma omp parallel num_threads(int(threads))
  work();
#endif
}

}  // namespace moert::cpu
