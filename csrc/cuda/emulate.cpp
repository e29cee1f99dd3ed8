// _longjmp between stacks is what this file does on purpose.
#undef _FORTIFY_SOURCE

#include "cuda/emulate.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

moert::emulate::Index threadIdx, blockIdx, blockDim, gridDim;

namespace moert::emulate {

namespace {

constexpr size_t kStack = 256 * 1024;
constexpr int kLanes = 32;
constexpr unsigned kMostThreads = 1024;

struct Fiber {
  std::unique_ptr<char[]> stack;
  ucontext_t start;
  jmp_buf here;
  bool started = false, done = true;
  void* fake_stack = nullptr;    // the address sanitizer's
  int64_t* waits_for = nullptr;  // a count, of completed barriers for one, ...
  int64_t passed = 0;            // ... that must exceed this
};

struct Warp {
  int arrived = 0;
  int64_t completed = 0;
  uint64_t values[2][kLanes];  // of this exchange and of the one before, which a lane may still read
};

struct Block {
  std::unique_ptr<Fiber[]> fibers{new Fiber[kMostThreads]};  // they hold their own addresses
  std::vector<Warp> warps;
  unsigned threads = 0, current = 0, alive = 0, arrived = 0;
  int64_t completed = 0;
  const std::function<void()>* kernel = nullptr;
  std::vector<char> shared;
  jmp_buf scheduler;
  void* fake_stack = nullptr;
  const void* bottom = nullptr;
  size_t size = 0;
};

Block block;

void enter_fiber([[maybe_unused]] const Fiber& f) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&block.fake_stack, f.stack.get(), kStack);
#endif
}

void entered_scheduler() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(block.fake_stack, nullptr, nullptr);
#endif
}

// The two below run on the fiber's stack.
void leave_fiber([[maybe_unused]] Fiber& f) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&f.fake_stack, block.bottom, block.size);
#endif
}

void entered_fiber([[maybe_unused]] Fiber& f) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(f.fake_stack, &block.bottom, &block.size);
#endif
}

void yield() {
  Fiber& f = block.fibers[block.current];
  leave_fiber(f);
  if (!_setjmp(f.here)) _longjmp(block.scheduler, 1);
  entered_fiber(f);
}

// A fiber serves one thread of one block after another.
void live() {
  Fiber& f = block.fibers[block.current];
  entered_fiber(f);
  for (;;) {
    (*block.kernel)();
    f.done = true;
    --block.alive;
    yield();
  }
}

void resume(unsigned i) {
  Fiber& f = block.fibers[i];
  block.current = i;
  threadIdx = {i, 0, 0};
  enter_fiber(f);
  if (!_setjmp(block.scheduler)) {
    if (f.started) _longjmp(f.here, 1);
    f.started = true;
    f.stack.reset(new char[kStack]);
    getcontext(&f.start);
    f.start.uc_stack.ss_sp = f.stack.get();
    f.start.uc_stack.ss_size = kStack;
    f.start.uc_link = nullptr;
    makecontext(&f.start, &live, 0);
    setcontext(&f.start);
  }
  entered_scheduler();
}

// A barrier that the living threads have all reached opens; that of a block also when a thread ends.
void open_block_barrier() {
  if (block.arrived == 0 || block.arrived < block.alive) return;
  block.arrived = 0;
  ++block.completed;
}

void run_block(unsigned order) {
  for (Warp& w : block.warps) w = {};
  std::fill(block.shared.begin(), block.shared.end(), char(0xA5));
  for (unsigned i = 0; i < block.threads; ++i) block.fibers[i].done = false;
  block.alive = block.threads;
  block.arrived = 0;
  block.completed = 0;
  while (block.alive) {
    bool progress = false;
    for (unsigned n = 0; n < block.threads; ++n) {
      const unsigned i = order % 2 ? block.threads - 1 - n : n;
      Fiber& f = block.fibers[i];
      if (f.done || (f.waits_for && *f.waits_for <= f.passed)) continue;
      resume(i);
      open_block_barrier();
      progress = true;
    }
    if (!progress) fail("every thread of a block must reach its barriers and collectives, got some that wait for ever");
  }
}

}  // namespace

void fail(const char* what) {
  std::fprintf(stderr, "emulated block %u,%u, thread %u: %s\n", blockIdx.x, blockIdx.y, threadIdx.x, what);
  std::abort();
}

void wait(int64_t& count, int64_t passed) {
  Fiber& f = block.fibers[block.current];
  f.waits_for = &count;
  f.passed = passed;
  while (count <= passed) yield();
  f.waits_for = nullptr;
}

void sync_block() {
  const int64_t passed = block.completed;
  ++block.arrived;
  wait(block.completed, passed);
}

const uint64_t* exchange(unsigned mask, uint64_t value) {
  if (mask != 0xffffffffu) fail("the mask of a collective must be all lanes");
  Warp& warp = block.warps[block.current / kLanes];
  const int64_t passed = warp.completed;
  uint64_t* values = warp.values[passed % 2];
  values[block.current % kLanes] = value;
  if (++warp.arrived == kLanes) {
    warp.arrived = 0;
    ++warp.completed;
  } else {
    wait(warp.completed, passed);
  }
  return values;
}

void* shared_memory() { return block.shared.data(); }

void run(Index grid, unsigned threads, size_t shared, const std::function<void()>& kernel, size_t most_shared) {
  if (threads == 0 || threads > kMostThreads || threads % kLanes)
    fail("a block must have 32 to 1024 threads in whole warps");
  block.threads = threads;
  block.warps.resize(threads / kLanes);
  block.kernel = &kernel;
  if (shared > most_shared) fail("a block must have at most 99 KiB of shared memory, of sm_90 227 KiB");
  block.shared = std::vector<char>(shared);  // of its own, so that a sanitizer sees its end
  blockDim = {threads, 1, 1};
  gridDim = grid;
  unsigned order = 0;
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = {x, y, 0};
      run_block(order++);
    }
}

}  // namespace moert::emulate
