// The kernels around the grouped products of fused_experts: memory-bound, one pass each, in a fixed order.
#pragma once

#include "cuda/expert_tiles.h"
#include "cuda/grouped_gemm_product.h"
#include "cuda/onto.h"
#include "cuda/simt.h"

namespace moert::cuda {

constexpr int kRowThreads = 256;

// scale[slots[i]] = weights[i].
template <typename A>
__global__ void __launch_bounds__(kRowThreads)
    scale_by_slot(const A* weights, const int32_t* slots, int64_t choices, int64_t S, A* scale) {
  const int64_t i = int64_t(blockIdx.x) * kRowThreads + threadIdx.x;
  if (i < choices && slots[i] >= 0 && slots[i] < S) scale[slots[i]] = weights[i];
}

// out[t, j] = the sum of the slot's parts + <a[t], b[row]>, where the row is the choice's slot or, of b2, its expert; 0
// where the choice was dropped.
template <typename T>
struct ChoiceDots {
  int64_t choices, k, N, S, rows;  // of b: those of slots, or those of experts
  const int32_t *slots, *ids;      // [T, k]; row = slot where ids is null
  const Acc<T>* parts;             // [S, num_parts] or null
  int64_t num_parts;
  const T *a, *b;  // b may be null
  int64_t a_stride, b_stride;
  Acc<T>* out;
};

// A lane's part of <a, b>, 16 bytes at a time where both lie so.
template <typename T>
MOERT_DEVICE_INLINE Acc<T> lane_dot(const T* a, const T* b, int64_t N) {
  const int64_t chunks = is_aligned(a, 0) && is_aligned(b, 0) ? N / kChunk<T> : 0;
  Acc<T> dot = 0;
  for (int64_t c = lane_id(); c < chunks; c += kWarp) {
    const Chunk x = load_chunk(a + c * kChunk<T>), y = load_chunk(b + c * kChunk<T>);
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) dot += element<T>(x, i) * element<T>(y, i);
  }
  for (int64_t n = chunks * kChunk<T> + lane_id(); n < N; n += kWarp) dot += Acc<T>(widen(a[n])) * Acc<T>(widen(b[n]));
  return dot;
}

// One warp a choice.
template <typename T>
__global__ void __launch_bounds__(kRowThreads) choice_dots(ChoiceDots<T> p) {
  const int64_t i = int64_t(blockIdx.x) * (kRowThreads / kWarp) + warp_id();
  if (i >= p.choices) return;
  const int32_t slot = p.slots[i], row = p.ids ? p.ids[i] : slot;
  Acc<T> dot = 0;
  if (slot >= 0 && slot < p.S) {
    if (p.b && row >= 0 && row < p.rows) dot = lane_dot(p.a + i / p.k * p.a_stride, p.b + row * p.b_stride, p.N);
    for (int64_t n = lane_id(); p.parts && n < p.num_parts; n += kWarp) dot += p.parts[slot * p.num_parts + n];
  }
  dot = warp_sum(dot);
  if (lane_id() == 0) p.out[i] = dot;
}

// out[e, n] = sum over the slots s of e of (scale[s] *) rows[s, n], or that is added to onto[e, n], which stays as it
// is where there is no slot.
template <typename T>
struct SlotSums {
  int32_t S, E;
  int64_t N;
  const int32_t* offsets;
  RowsOf<T> rows;
  const Acc<T>* scale;  // or null
  T* out;
  Acc<T>* onto;        // or null
  int64_t out_stride;  // of either
};

// A block sums kWarp columns of one expert; warp i takes every eighth slot from i on.
template <typename T>
__global__ void __launch_bounds__(kRowThreads) slot_sums(SlotSums<T> p) {
  using A = Acc<T>;
  constexpr int kWarps = kRowThreads / kWarp;
  __shared__ A parts[kWarps][kWarp];
  const int64_t columns = (p.N + kWarp - 1) / kWarp, e = blockIdx.x / columns;
  const int64_t n = blockIdx.x % columns * kWarp + lane_id();
  const Slots slots = slots_of(p.offsets, e, p.S);
  A sum = 0;
  for (int64_t s = slots.begin + warp_id(); n < p.N && s < slots.begin + slots.count; s += kWarps) {
    const T* row = p.rows.row(s);
    if (row) sum += (p.scale ? p.scale[s] : A(1)) * A(widen(row[n]));
  }
  parts[warp_id()][lane_id()] = sum;
  __syncthreads();
  if (warp_id() || n >= p.N) return;
  for (int i = 1; i < kWarps; ++i) sum += parts[i][lane_id()];
  if (!p.onto)
    p.out[e * p.out_stride + n] = narrow<T>(sum);
  else if (slots.count)
    p.onto[e * p.out_stride + n] += sum;
}

// rows[s] *= scale[s], one block a slot.
template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    scale_rows(const int32_t* used, const Acc<T>* scale, int64_t width, T* rows) {
  const int64_t s = blockIdx.x;
  if (s >= *used) return;
  for (int64_t i = threadIdx.x; i < width; i += kRowThreads)
    rows[s * width + i] = narrow<T>(scale[s] * Acc<T>(widen(rows[s * width + i])));
}

// What products that add to sums [T, H] begin with and end in, `n` columns a thread.
template <typename T, int n>
__global__ void __launch_bounds__(kRowThreads) start_sums(OntoOf<T> onto, int64_t count, int64_t H, Acc<T>* sums) {
  const int64_t i = (int64_t(blockIdx.x) * kRowThreads + threadIdx.x) * n;
  if (i >= count) return;
  Neighbours<Acc<T>, n> start;
#pragma unroll
  for (int j = 0; j < n; ++j) start.values[j] = onto.at(i / H, i % H + j, H);
  put(sums + i, start);
}

template <typename T, int n>
__global__ void __launch_bounds__(kRowThreads) round_sums(const Acc<T>* sums, int64_t count, T* y) {
  const int64_t i = (int64_t(blockIdx.x) * kRowThreads + threadIdx.x) * n;
  if (i >= count) return;
  const Neighbours<Acc<T>, n> sum = take<n>(sums + i);
  Neighbours<T, n> out;
#pragma unroll
  for (int j = 0; j < n; ++j) out.values[j] = narrow<T>(sum.values[j]);
  put(y + i, out);
}

}  // namespace moert::cuda
