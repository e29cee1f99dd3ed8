// A thread block on the host: CUDA's words for plain SIMT kernels, over one fiber a thread.  A wrong index, a missing
// barrier or a collective that not every lane reaches can be found here, before a GPU is.
//
// Clusters of blocks, mostly of one, run one after another.  A thread runs until it waits, the threads of a cluster in
// ascending order, of every other cluster in descending: a race that needs another order stays hidden.  __shared__ is
// static, one copy for the block at work, and so not for a cluster of several; MOERT_SHARED is each block's own.
#pragma once

#if defined(__CUDACC__)
#error "cuda/emulate.h must be compiled by a host compiler, got nvcc"
#endif

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __restrict__

namespace moert::emulate {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// Bytes of shared memory that a block may have: of every GPU from sm_80 on, of sm_90.
constexpr size_t kMostShared = 99 * 1024, kMostSharedOfHopper = 227 * 1024;

// Runs `kernel` in every thread of every block, which has `shared` bytes of memory, at first of no use.  `cluster`
// blocks, neighbours in x, run together.
void run(Index grid, unsigned threads, size_t shared, const std::function<void()>& kernel,
         size_t most_shared = kMostShared, unsigned cluster = 1);

// Kernels that have run.
inline int64_t kernels_run = 0;

// Of the calling thread's block.
void* shared_memory();

// The thread's number in its cluster, and its block's.
unsigned thread_in_cluster();
unsigned block_in_cluster();

// What lies in another block of the cluster at the place that `p` has in the caller's.
void* in_block(void* p, unsigned block);

// Whether asynchronous copies arrive when they are asked for, else when they are waited for.
inline bool copies_at_once = false;

[[noreturn]] void fail(const char* what);

// Waits for every living thread of the block, or of the cluster.
void sync_block();
void sync_cluster();

// Waits until a count, which other threads raise, exceeds `passed`.
void wait(int64_t& count, int64_t passed);

// Every lane of the warp gives 8 bytes and gets all 32 of them; the array is good until the lane's next exchange.
const uint64_t* exchange(unsigned mask, uint64_t value);

template <typename T>
T& aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % alignof(T)) fail("a load or store must be aligned");
  return *static_cast<T*>(const_cast<void*>(p));
}

template <typename T>
uint64_t bits_of(T x) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof(T));
  return bits;
}

template <typename T>
T value_of(uint64_t bits) {
  T x;
  std::memcpy(&x, &bits, sizeof(T));
  return x;
}

}  // namespace moert::emulate

extern moert::emulate::Index threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads() { moert::emulate::sync_block(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { moert::emulate::exchange(mask, 0); }
inline void __threadfence() {}

template <typename T>
T __shfl_sync(unsigned mask, T x, int lane) {
  return moert::emulate::value_of<T>(moert::emulate::exchange(mask, moert::emulate::bits_of(x))[lane & 31]);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T x, int lanes) {
  return __shfl_sync(mask, x, int(threadIdx.x % 32) ^ lanes);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T x, unsigned delta) {
  const int lane = int(threadIdx.x % 32), from = lane - int(delta);
  return __shfl_sync(mask, x, from < 0 ? lane : from);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint64_t* all = moert::emulate::exchange(mask, predicate != 0);
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= unsigned(all[lane]) << lane;
  return bits;
}

inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }

template <typename T>
unsigned __match_any_sync(unsigned mask, T x) {
  const uint64_t mine = moert::emulate::bits_of(x), *all = moert::emulate::exchange(mask, mine);
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= unsigned(all[lane] == mine) << lane;
  return bits;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }

template <typename T>
T atomicAdd(T* p, T x) {
  const T before = *p;
  *p += x;
  return before;
}

template <typename T>
T atomicOr(T* p, T x) {
  const T before = *p;
  *p |= x;
  return before;
}
