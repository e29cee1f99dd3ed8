// The kernels around the grouped products of fused_experts: memory-bound, one pass each, in a fixed order.
#pragma once

#include "cuda/epilogue.h"
#include "cuda/expert_tiles.h"
#include "cuda/simt.h"

namespace moert::cuda {

constexpr int kRowThreads = 256;

// scale[slots[i]] = weights[i].
template <typename A>
__global__ void __launch_bounds__(kRowThreads)
    scale_by_slot(const A* weights, const int32_t* slots, int64_t choices, A* scale) {
  const int64_t i = int64_t(blockIdx.x) * kRowThreads + threadIdx.x;
  if (i < choices && slots[i] >= 0) scale[slots[i]] = weights[i];
}

// The sum over a block, in every thread, in an order that depends on the thread numbers alone.
template <typename A>
MOERT_DEVICE_INLINE A block_sum(A x) {
  __shared__ A parts[kRowThreads / kWarp];
  x = warp_sum(x);
  __syncthreads();
  if (lane_id() == 0) parts[warp_id()] = x;
  __syncthreads();
  A sum = 0;
  for (int i = 0; i < kRowThreads / kWarp; ++i) sum += parts[i];
  return sum;
}

// With g = dy . down of a slot and d = g, or weight g where the weight scales the output:
template <typename T>
struct ActivationBackward {
  int32_t S, E;
  int64_t I;
  const int32_t* offsets;
  const T* h;           // [S, I] or [S, 2I], gate then up
  const T* g;           // [S, I]
  const Acc<T>* scale;  // [S] or null
  ActivationForm<Acc<T>> form;
  bool alternate;  // dh holds gate and up in turns, else one after the other
  T* dh;           // [S, I] or [S, 2I]: the gradient of h, in the order of w1's rows
  T* act;          // [S, I] or null: weight act
  Acc<T>* dots;    // [S]: <g, act>
};

// One block a slot.
template <typename T>
__global__ void __launch_bounds__(kRowThreads) activation_backward(ActivationBackward<T> p) {
  using A = Acc<T>;
  const int64_t s = blockIdx.x, I = p.I, width = p.form.gated ? 2 * I : I;
  if (s >= p.offsets[p.E]) return;
  const A scale = p.scale ? p.scale[s] : A(1);
  A dot = 0;
  for (int64_t i = threadIdx.x; i < I; i += kRowThreads) {
    const A g = widen(p.g[s * I + i]), u = p.form.gated ? A(widen(p.h[s * width + I + i])) : A(0);
    const auto gradients = activate_backward(p.form, A(widen(p.h[s * width + i])), u, scale * g);
    p.dh[s * width + (p.alternate ? 2 * i : i)] = narrow<T>(gradients.dgate);
    if (p.form.gated) p.dh[s * width + (p.alternate ? 2 * i + 1 : I + i)] = narrow<T>(gradients.dup);
    if (p.act) p.act[s * I + i] = narrow<T>(scale * gradients.act);
    dot += g * gradients.act;
  }
  dot = block_sum(dot);
  if (threadIdx.x == 0) p.dots[s] = dot;
}

// out[t, j] = start[slot] + <a[t], b[row]>, where the row is the choice's slot or, of b2, its expert; 0 where the
// choice was dropped.
template <typename T>
struct ChoiceDots {
  int64_t k, H;
  const int32_t *slots, *ids;  // [T, k]; row = slot where ids is null
  const Acc<T>* start;         // [S] or null
  const T *a, *b;              // b may be null
  int64_t a_stride, b_stride;
  Acc<T>* out;
};

// One block a choice.
template <typename T>
__global__ void __launch_bounds__(kRowThreads) choice_dots(ChoiceDots<T> p) {
  using A = Acc<T>;
  const int64_t i = blockIdx.x, t = i / p.k;
  const int32_t slot = p.slots[i];
  A dot = 0;
  if (slot >= 0 && p.b) {
    const T *a = p.a + t * p.a_stride, *b = p.b + (p.ids ? p.ids[i] : slot) * p.b_stride;
    for (int64_t n = threadIdx.x; n < p.H; n += kRowThreads) dot += A(widen(a[n])) * A(widen(b[n]));
  }
  dot = block_sum(dot);
  if (threadIdx.x == 0) p.out[i] = slot < 0 ? A(0) : dot + (p.start ? p.start[slot] : A(0));
}

// out[e, n] = sum over the slots s of e of (scale[s] *) rows[s, n].
template <typename T>
struct SlotSums {
  int32_t S, E;
  int64_t N;
  const int32_t* offsets;
  const T* rows;
  int64_t stride;
  const int32_t* index;  // of rows, or null
  const Acc<T>* scale;   // or null
  T* out;
  int64_t out_stride;
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
    const int64_t row = p.index ? p.index[s] : s;
    sum += (p.scale ? p.scale[s] : A(1)) * A(widen(p.rows[row * p.stride + n]));
  }
  parts[warp_id()][lane_id()] = sum;
  __syncthreads();
  if (warp_id() || n >= p.N) return;
  for (int i = 1; i < kWarps; ++i) sum += parts[i][lane_id()];
  p.out[e * p.out_stride + n] = narrow<T>(sum);
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

}  // namespace moert::cuda
