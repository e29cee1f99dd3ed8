// Threads for the kernels.  Which thread runs a task never changes a result: every task writes its own part of the
// output.
#pragma once

#include <sched.h>  // not <thread>, which takes a third of what such a file takes to be read

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "moert/isa.h"

#ifdef MOERT_STD_THREAD  // for the thread sanitizer, which cannot see into libgomp's barriers
#include <thread>
#include <vector>
#else
#include <omp.h>
#endif

namespace moert::cpu {

// Outputs larger than this are written past the caches, which would read them first.
constexpr int64_t kStreamBytes = 16 << 20;

// What the threads of one parallel region share.
struct TeamState {
  alignas(64) std::atomic<int64_t> next{0};
  alignas(64) std::atomic<int64_t> arrived{0};
  std::atomic<int64_t> phase{0};
};

// One thread's view of its region.
class Team {
 public:
  Team(TeamState& state, int64_t threads) : state_(state), threads_(threads) {}

  // f(task) for every task in [0, tasks); a free thread takes the next task in order, or the next few where `runs`:
  // first many, in the end one.  Every thread of the region calls it; it returns when all tasks are done.
  template <typename F>
  void for_each(int64_t tasks, const F& f, bool runs = false) {
    if (threads_ == 1) {
      for (int64_t task = 0; task < tasks; ++task) f(task);
    } else if (runs) {
      for (int64_t task = state_.next.load(std::memory_order_relaxed); task < tasks;) {
        const int64_t end = task + std::max<int64_t>(1, (tasks - task) / (kRunShare * threads_));
        if (!state_.next.compare_exchange_weak(task, end, std::memory_order_relaxed)) continue;
        for (; task < end; ++task) f(task);
        task = state_.next.load(std::memory_order_relaxed);
      }
    } else {
      for (int64_t task; (task = state_.next.fetch_add(1, std::memory_order_relaxed)) < tasks;) f(task);
    }
#if defined(__x86_64__)
    __builtin_ia32_sfence();  // what was stored past the caches is there before another thread is told
#endif
    if (threads_ > 1) wait();
  }

 private:
  // The others are microseconds away: spinning costs less than to sleep and be woken, unless another program has the
  // core of a thread that is waited for.
  static constexpr int kSpins = 4096;

  static constexpr int64_t kRunShare = 2;  // a run is this part of what would be a thread's share

  void wait() {
    const int64_t phase = state_.phase.load(std::memory_order_relaxed);
    if (state_.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      state_.arrived.store(0, std::memory_order_relaxed);
      state_.next.store(0, std::memory_order_relaxed);
      state_.phase.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; state_.phase.load(std::memory_order_acquire) == phase; ++spins) {
      if (spins >= kSpins) sched_yield();
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
  }

  TeamState& state_;
  int64_t threads_;
};

// body(team) on `threads` threads (fewer inside another parallel region).
template <typename F>
void parallel_region(int64_t threads, const F& body) {
  isa();  // throws for a wrong MOERT_ISA here: an exception that leaves an OpenMP region ends the process
  TeamState state;
  if (threads <= 1) {
    Team team(state, 1);
    body(team);
    return;
  }
#ifdef MOERT_STD_THREAD
  const auto work = [&] {
    Team team(state, threads);
    body(team);
  };
  std::vector<std::thread> pool;
  for (int64_t i = 1; i < threads; ++i) pool.emplace_back(work);
  work();
  for (auto& thread : pool) thread.join();
#else
#pragma omp parallel num_threads(int(threads))
  {
    Team team(state, omp_get_num_threads());
    body(team);
  }
#endif
}

// A region of one phase.
template <typename F>
void parallel_for(int64_t tasks, int64_t threads, const F& f) {
  parallel_region(std::min(threads, tasks), [&](Team& team) { team.for_each(tasks, f); });
}

constexpr int64_t kTaskBytes = 128 * 1024;  // of rows; less is not worth a thread

// f(i) for every row i in [0, n), where each touches about `bytes` bytes.
template <typename F>
void parallel_for_rows(int64_t n, int64_t bytes, int64_t threads, const F& f) {
  const int64_t step = std::max<int64_t>(1, kTaskBytes / std::max<int64_t>(1, bytes));
  parallel_for((n + step - 1) / step, threads, [&](int64_t task) {
    for (int64_t i = task * step, end = std::min(n, i + step); i < end; ++i) f(i);
  });
}

}  // namespace moert::cpu
