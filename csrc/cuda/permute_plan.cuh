// The plan: a stable counting sort of the choices by expert.  A block sorts a run of choices, its warps one part of the
// run each, in their order; a warp counts and places 32 choices at a time.
#pragma once

#include "cuda/simt.h"

namespace moert::cuda {

struct PlanCall {
  const int32_t* ids;  // [choices]
  int64_t choices, k;
  int E;
  int64_t capacity;  // -1: none
  int64_t run;       // choices of a block
  int32_t* counts;   // [blocks, E]: choices of each expert in each block, then the slots before them
  int32_t *offsets, *tokens, *slots;
};

// One warp's share of a block's run.
struct WarpRun {
  int64_t begin, end;

  MOERT_DEVICE_INLINE explicit WarpRun(const PlanCall& p) {
    const int64_t warps = blockDim.x / kWarp, first = int64_t(blockIdx.x) * p.run;
    const int64_t share = (p.run + warps * kWarp - 1) / (warps * kWarp) * kWarp;
    const int64_t last = first + p.run < p.choices ? first + p.run : p.choices;
    begin = first + warp_id() * share;
    end = begin + share < last ? begin + share : last;
  }
};

// f(choice, expert, lanes of the warp with that expert) for the choices of this warp, 32 at a time and in order; the
// expert is -1 in lanes without a choice or with one that is dropped.
template <typename F>
MOERT_DEVICE_INLINE void for_choices(const PlanCall& p, const F& f) {
  const WarpRun run(p);
  for (int64_t first = run.begin; first < run.end; first += kWarp) {
    const int64_t i = first + lane_id();
    const int id = i < run.end ? p.ids[i] : -1;
    const int e = id >= 0 && id < p.E ? id : -1;
    f(i < run.end ? i : -1, e, __match_any_sync(kAllLanes, e));
  }
}

MOERT_DEVICE_INLINE bool is_first(unsigned lanes) { return __ffs(int(lanes)) - 1 == lane_id(); }

// counts [warps, E] = the choices of each expert in each warp's share.
MOERT_DEVICE_INLINE void count_choices(const PlanCall& p, int32_t* counts) {
  for (int i = threadIdx.x; i < int(blockDim.x) / kWarp * p.E; i += blockDim.x) counts[i] = 0;
  __syncthreads();
  int32_t* mine = counts + warp_id() * p.E;
  for_choices(p, [&](int64_t, int e, unsigned lanes) {
    if (e >= 0 && is_first(lanes)) mine[e] += __popc(lanes);
    __syncwarp();
  });
  __syncthreads();
}

// The slot of expert e's first choice: that of a rectangle, or the number of slots before it.
MOERT_HOST_DEVICE inline int64_t first_slot(int64_t capacity, int64_t e, int64_t before) {
  return capacity < 0 ? before : e * capacity;
}

// A warp: totals [E] -> offsets [E+1].
MOERT_DEVICE_INLINE void write_offsets(const PlanCall& p, const int32_t* totals) {
  int32_t before = 0;
  for (int first = 0; first < p.E; first += kWarp) {
    const int e = first + lane_id();
    const int32_t count = e < p.E ? totals[e] : 0, exclusive = warp_exclusive(count);
    if (e < p.E) p.offsets[e] = int32_t(first_slot(p.capacity, e, before + exclusive));
    before += __shfl_sync(kAllLanes, exclusive + count, kWarp - 1);
  }
  if (lane_id() == 0) p.offsets[p.E] = int32_t(first_slot(p.capacity, p.E, before));
}

// counts [warps, E] -> the slot of each warp's first choice of each expert.  before: the slots of the blocks before.
template <typename F>
MOERT_DEVICE_INLINE void scan_warps(const PlanCall& p, int32_t* counts, const F& before) {
  for (int e = threadIdx.x; e < p.E; e += blockDim.x) {
    int32_t slot = before(e);
    for (int w = 0; w < int(blockDim.x) / kWarp; ++w) {
      const int32_t count = counts[w * p.E + e];
      counts[w * p.E + e] = slot;
      slot += count;
    }
  }
  __syncthreads();
}

// tokens and slots of this block's choices; next [warps, E] as scan_warps left it.
MOERT_DEVICE_INLINE void place_choices(const PlanCall& p, int32_t* next) {
  int32_t* mine = next + warp_id() * p.E;
  for_choices(p, [&](int64_t i, int e, unsigned lanes) {
    int32_t slot = -1;
    if (e >= 0) {
      slot = mine[e] + __popc(lanes & ((1u << lane_id()) - 1));
      if (slot < 0 || (p.capacity >= 0 && slot >= (e + 1) * p.capacity)) slot = -1;  // below 0: beyond 2^31
    }
    __syncwarp();
    if (e >= 0 && is_first(lanes)) mine[e] += __popc(lanes);
    __syncwarp();
    if (i < 0) return;
    p.slots[i] = slot;
    if (slot >= 0) p.tokens[slot] = int32_t(i / p.k);
  });
}

// Slots that no choice has, spread over all threads of the grid.  used(e): the choices of expert e.
template <typename F>
MOERT_DEVICE_INLINE void clear_rest(const PlanCall& p, const F& used) {
  const int64_t all = p.capacity < 0 ? p.choices : p.E * p.capacity, step = int64_t(gridDim.x) * blockDim.x;
  int64_t s = p.capacity < 0 ? p.offsets[p.E] : 0;
  for (s += int64_t(blockIdx.x) * blockDim.x + threadIdx.x; s < all; s += step)
    if (p.capacity < 0 || s % p.capacity >= used(int(s / p.capacity))) p.tokens[s] = -1;
}

// All of it in one block.  Shared: [warps, E] counters and [E] totals.
__global__ void __launch_bounds__(1024, 1) plan_in_one_block(const PlanCall p) {
  MOERT_SHARED(int32_t, counts);
  const int warps = blockDim.x / kWarp;
  int32_t* totals = counts + warps * p.E;
  count_choices(p, counts);
  for (int e = threadIdx.x; e < p.E; e += blockDim.x) {
    int32_t total = 0;
    for (int w = 0; w < warps; ++w) total += counts[w * p.E + e];
    totals[e] = total;
  }
  __syncthreads();
  if (warp_id() == 0) write_offsets(p, totals);
  __syncthreads();
  scan_warps(p, counts, [&](int e) { return p.offsets[e]; });
  place_choices(p, counts);
  clear_rest(p, [&](int e) { return totals[e]; });
}

// The three kernels of a longer plan: counts of each block, their sums, the places.
__global__ void __launch_bounds__(1024) plan_count(const PlanCall p) {
  MOERT_SHARED(int32_t, counts);
  count_choices(p, counts);
  for (int e = threadIdx.x; e < p.E; e += blockDim.x) {
    int32_t total = 0;
    for (int w = 0; w < int(blockDim.x) / kWarp; ++w) total += counts[w * p.E + e];
    p.counts[int64_t(blockIdx.x) * p.E + e] = total;
  }
}

// One block.  counts [blocks, E] -> the choices of the expert in the blocks before; row `blocks` gets the totals.
__global__ void __launch_bounds__(1024) plan_scan(const PlanCall p, int blocks) {
  int32_t* totals = p.counts + int64_t(blocks) * p.E;
  for (int e = warp_id(); e < p.E; e += blockDim.x / kWarp) {
    int32_t before = 0;
    for (int first = 0; first < blocks; first += kWarp) {
      const int b = first + lane_id();
      const int32_t count = b < blocks ? p.counts[int64_t(b) * p.E + e] : 0, exclusive = warp_exclusive(count);
      if (b < blocks) p.counts[int64_t(b) * p.E + e] = before + exclusive;
      before += __shfl_sync(kAllLanes, exclusive + count, kWarp - 1);
    }
    if (lane_id() == 0) totals[e] = before;
  }
  __syncthreads();
  if (warp_id() == 0) write_offsets(p, totals);
}

__global__ void __launch_bounds__(1024) plan_place(const PlanCall p) {
  MOERT_SHARED(int32_t, counts);
  const int32_t *before = p.counts + int64_t(blockIdx.x) * p.E, *totals = p.counts + int64_t(gridDim.x) * p.E;
  count_choices(p, counts);
  scan_warps(p, counts, [&](int e) { return p.offsets[e] + before[e]; });
  place_choices(p, counts);
  clear_rest(p, [&](int e) { return totals[e]; });
}

}  // namespace moert::cuda
