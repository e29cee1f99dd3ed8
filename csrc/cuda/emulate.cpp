// _longjmp between stacks is what this file does on purpose.
#undef _FORTIFY_SOURCE

#include "cuda/emulate.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <new>
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

// Of a block or of a cluster.
struct ThreadBarrier {
  unsigned alive = 0, arrived = 0;
  int64_t completed = 0;

  // Opens once the living threads have all reached it, also when a thread ends.
  void open() {
    if (arrived == 0 || arrived < alive) return;
    arrived = 0;
    ++completed;
  }
};

// In every block at the same distance from a multiple of 1024 bytes, as on a GPU, but at none.
constexpr size_t kSharedAlign = 1024, kSharedSkew = 16;

struct FreeShared {
  void operator()(char* p) const { ::operator delete(p, std::align_val_t{kSharedAlign}); }
};

struct Block {
  ThreadBarrier barrier;
  std::unique_ptr<char, FreeShared> memory;

  char* shared() const { return memory.get() + kSharedSkew; }
};

struct Cluster {
  std::unique_ptr<Fiber[]> fibers{new Fiber[kMostThreads]};  // they hold their own addresses
  std::vector<Warp> warps;
  std::vector<Block> blocks;
  ThreadBarrier barrier;
  unsigned threads = 0, current = 0;  // threads: of a block
  Index first;                        // block
  const std::function<void()>* kernel = nullptr;
  size_t shared = 0;
  jmp_buf scheduler;
  void* fake_stack = nullptr;
  const void* bottom = nullptr;
  size_t size = 0;
};

Cluster cluster;

Block& current_block() { return cluster.blocks[cluster.current / cluster.threads]; }

void enter_fiber([[maybe_unused]] const Fiber& f) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&cluster.fake_stack, f.stack.get(), kStack);
#endif
}

void entered_scheduler() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(cluster.fake_stack, nullptr, nullptr);
#endif
}

// The two below run on the fiber's stack.
void leave_fiber([[maybe_unused]] Fiber& f) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&f.fake_stack, cluster.bottom, cluster.size);
#endif
}

void entered_fiber([[maybe_unused]] Fiber& f) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(f.fake_stack, &cluster.bottom, &cluster.size);
#endif
}

void yield() {
  Fiber& f = cluster.fibers[cluster.current];
  leave_fiber(f);
  if (!_setjmp(f.here)) _longjmp(cluster.scheduler, 1);
  entered_fiber(f);
}

// A fiber serves one thread of one block after another.
void live() {
  Fiber& f = cluster.fibers[cluster.current];
  entered_fiber(f);
  for (;;) {
    (*cluster.kernel)();
    f.done = true;
    --current_block().barrier.alive;
    --cluster.barrier.alive;
    yield();
  }
}

void resume(unsigned i) {
  Fiber& f = cluster.fibers[i];
  cluster.current = i;
  threadIdx = {i % cluster.threads, 0, 0};
  blockIdx = {cluster.first.x + i / cluster.threads, cluster.first.y, 0};
  enter_fiber(f);
  if (!_setjmp(cluster.scheduler)) {
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

void run_cluster(unsigned order) {
  const unsigned threads = cluster.threads * unsigned(cluster.blocks.size());
  for (Warp& w : cluster.warps) w = {};
  cluster.barrier = {threads};
  for (Block& b : cluster.blocks) {
    b.barrier = {cluster.threads};
    std::fill(b.shared(), b.shared() + cluster.shared, char(0xA5));
  }
  for (unsigned i = 0; i < threads; ++i) cluster.fibers[i].done = false;
  while (cluster.barrier.alive) {
    bool progress = false;
    for (unsigned n = 0; n < threads; ++n) {
      const unsigned i = order % 2 ? threads - 1 - n : n;
      Fiber& f = cluster.fibers[i];
      if (f.done || (f.waits_for && *f.waits_for <= f.passed)) continue;
      resume(i);
      current_block().barrier.open();
      cluster.barrier.open();
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
  Fiber& f = cluster.fibers[cluster.current];
  f.waits_for = &count;
  f.passed = passed;
  while (count <= passed) yield();
  f.waits_for = nullptr;
}

namespace {

void reach(ThreadBarrier& barrier) {
  const int64_t passed = barrier.completed;
  ++barrier.arrived;
  wait(barrier.completed, passed);
}

}  // namespace

void sync_block() { reach(current_block().barrier); }
void sync_cluster() { reach(cluster.barrier); }

unsigned thread_in_cluster() { return cluster.current; }
unsigned block_in_cluster() { return cluster.current / cluster.threads; }

void* shared_memory() { return current_block().shared(); }

void* in_block(void* p, unsigned block) {
  if (block >= cluster.blocks.size()) fail("a block must be one of its cluster");
  return cluster.blocks[block].shared() + (static_cast<char*>(p) - current_block().shared());
}

const uint64_t* exchange(unsigned mask, uint64_t value) {
  if (mask != 0xffffffffu) fail("the mask of a collective must be all lanes");
  Warp& warp = cluster.warps[cluster.current / kLanes];
  const int64_t passed = warp.completed;
  uint64_t* values = warp.values[passed % 2];
  values[cluster.current % kLanes] = value;
  if (++warp.arrived == kLanes) {
    warp.arrived = 0;
    ++warp.completed;
  } else {
    wait(warp.completed, passed);
  }
  return values;
}

void run(Index grid, unsigned threads, size_t shared, const std::function<void()>& kernel, size_t most_shared,
         unsigned blocks) {
  if (threads == 0 || threads * blocks > kMostThreads || threads % kLanes)
    fail("a block must have 32 to 1024 threads in whole warps, and a cluster as many");
  if (shared > most_shared) fail("a block must have at most 99 KiB of shared memory, of sm_90 227 KiB");
  if (blocks == 0 || grid.x % blocks) fail("a grid must have whole clusters");
  ++kernels_run;
  cluster.threads = threads;
  cluster.warps.resize(threads * blocks / kLanes);
  cluster.kernel = &kernel;
  cluster.shared = shared;
  cluster.blocks = std::vector<Block>(blocks);
  for (Block& b : cluster.blocks)  // each of its own, so that a sanitizer sees its end
    b.memory.reset(static_cast<char*>(::operator new(shared + kSharedSkew, std::align_val_t{kSharedAlign})));
  blockDim = {threads, 1, 1};
  gridDim = grid;
  unsigned order = 0;
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; x += blocks) {
      cluster.first = {x, y, 0};
      run_cluster(order++);
    }
}

}  // namespace moert::emulate
