#include "cpu/parallel.h"

#include <atomic>
#include <vector>

#include "expect.h"

using namespace moert::cpu;

namespace {

// Every task runs once, whether threads take one or several, and a region's next phase begins with the first again.
void every_task_once() {
  for (const int64_t threads : {1, 2, 3, 7})
    for (const int64_t tasks : {0, 1, 5, 64, 1000}) {
      std::vector<std::atomic<int>> seen(tasks);
      parallel_region(threads, [&](Team& team) {
        for (const bool runs : {true, false, true}) team.for_each(tasks, [&](int64_t task) { ++seen[task]; }, runs);
      });
      for (const std::atomic<int>& count : seen) EXPECT(count == 3);
    }
}

// What one thread takes at once follows each other: at first half of what would be its share.
void runs_of_tasks() {
  constexpr int64_t kThreads = 4, kTasks = 1000, kFirst = kTasks / kThreads / 2;
  std::vector<const Team*> by(kTasks);
  parallel_region(kThreads, [&](Team& team) { team.for_each(kTasks, [&](int64_t task) { by[task] = &team; }, true); });
  for (int64_t task = 0; task < kFirst; ++task) EXPECT(by[task] && by[task] == by[0]);
}

}  // namespace

int main() {
  every_task_once();
  runs_of_tasks();
}
