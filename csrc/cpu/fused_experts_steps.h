// The steps that the forward and the backward of fused_experts share.  A is the type of values: float or double.
#pragma once

#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/tile_tasks.h"
#include "moert/fused_experts.h"
#include "moert/permute.h"

namespace moert::cpu {

// Columns of gate and of up in one tile: the two share the block of x that the tile widens.
constexpr int64_t kHalfColumns = kTileColumns / 2;

constexpr int64_t kCombineTokens = 16;  // a task of combine()

// The routing in slot order.
template <typename A>
struct Plan {
  int64_t T, k, E;
  Memory<int32_t> offsets, tokens, slots;  // as permute_plan gives them
  Memory<A> scale;                         // [slots used]: routing weight of each slot
  const A* weights;                        // [T, k]

  Plan(const RoutedRows& r, int64_t E, int64_t threads)
      : T(r.T),
        k(r.k),
        E(E),
        offsets(allocate<int32_t>(E + 1)),
        tokens(allocate<int32_t>(r.T * r.k)),
        slots(allocate<int32_t>(r.T * r.k)),
        scale(allocate<A>(r.T * r.k)),
        weights(static_cast<const A*>(r.weights)) {
    permute_plan(r.ids, T, k, E, -1, threads, offsets.get(), tokens.get(), slots.get());
    for (int64_t i = 0; i < T * k; ++i)
      if (slots[i] >= 0) scale[slots[i]] = weights[i];
  }

  int64_t slots_used() const { return offsets[E]; }
};

// The rows of x in slot order.
template <typename A>
Rows gathered(const Rows& x, const Plan<A>& plan) {
  return {x.data, x.dtype, x.stride, plan.tokens.get()};
}

// Elements [n, n + N) of an expert's vector as values in `row`, or null where there is none.
template <typename A>
const A* vector_of(const ExpertVector& v, int64_t stride, const TileTask& task, A* row) {
  if (!v.data) return nullptr;
  const char* data = at(v.data, v.dtype, task.expert * v.expert_stride + task.n * stride);
  gemm_kernels().widen({data, v.dtype, 0, stride, nullptr}, 1, task.N, row, 0);
  return row;
}

// act [slots, I] = activation of the pre-activations; h (may be null) [slots, 2I] = the pre-activations, gate then up.
template <typename A>
void first_gemm(const RoutedRows& tokens, const ExpertWeights& w, const Plan<A>& plan, int64_t threads, A* act,
                void* h) {
  const GemmKernels& kernels = gemm_kernels();
  const bool gated = is_gated(w.activation.act);
  const int64_t h_stride = gated ? 2 * w.I : w.I;
  const Rows x = gathered(tokens.x, plan);
  const auto tasks = tile_tasks(plan.offsets.get(), w.E, w.I, gated ? kHalfColumns : kTileColumns);
  parallel_for(int64_t(tasks.size()), threads, [&](int64_t i) {
    const TileTask& task = tasks[i];
    const TileMemory<A> memory = tile_memory<A>();
    const A* scale = w.scale_on == ScaleOn::input ? plan.scale.get() + task.row : nullptr;
    const auto half = [&](const ExpertMatrix& weight, const ExpertVector& bias, A* c, int64_t column) {
      GemmTile tile{task.M, task.N, w.H, tile_of(x, task.row, 0), {}, false, false, false, c, memory.scratch};
      set_b(tile, weight, task.expert, task.n, 0, true);
      kernels.gemm(tile);
      const A* b = vector_of(bias, w.bias1_stride, task, memory.row0);
      const StoreTile in_place{task.M, task.N, c, b, scale, ScaleOn::input, c, DTypeOf<A>::value, kTileColumns, 1};
      if (b || scale) kernels.store(in_place);
      if (!h) return;
      void* out = const_cast<char*>(at(h, x.dtype, task.row * h_stride + column + task.n));
      kernels.store({task.M, task.N, c, nullptr, nullptr, ScaleOn::output, out, x.dtype, h_stride, 1});
    };
    half(w.gate, w.gate_bias, memory.c0, 0);
    if (gated) half(w.up, w.up_bias, memory.c1, w.I);
    if (act)
      kernels.activate({task.M, task.N, w.activation, memory.c0, memory.c1, act + task.row * w.I + task.n, w.I},
                       sizeof(A) == 8);
  });
}

// out [slots, H] = act . down^T + bias.
template <typename A>
void second_gemm(const ExpertWeights& w, const Plan<A>& plan, const A* act, int64_t threads, A* out) {
  const GemmKernels& kernels = gemm_kernels();
  const Rows rows{act, DTypeOf<A>::value, w.I};
  const auto tasks = tile_tasks(plan.offsets.get(), w.E, w.H, kTileColumns);
  parallel_for(int64_t(tasks.size()), threads, [&](int64_t i) {
    const TileTask& task = tasks[i];
    const TileMemory<A> memory = tile_memory<A>();
    GemmTile tile{task.M, task.N, w.I, tile_of(rows, task.row, 0), {}, false, false, false, memory.c0, memory.scratch};
    set_b(tile, w.down, task.expert, task.n, 0, true);
    kernels.gemm(tile);
    const A* bias = vector_of(w.down_bias, 1, task, memory.row0);
    kernels.store({task.M, task.N, memory.c0, bias, nullptr, ScaleOn::output, out + task.row * w.H + task.n,
                   DTypeOf<A>::value, w.H, 1});
  });
}

// y[t] = sum over the kept choices of (weight *) rows[slot], in choice order; rows [slots, H] of values, y dense.
template <typename A>
void combine(const Plan<A>& plan, const A* rows, bool weighted, int64_t H, int64_t threads, void* y, DType dtype) {
  const GemmKernels& kernels = gemm_kernels();
  parallel_for((plan.T + kCombineTokens - 1) / kCombineTokens, threads, [&](int64_t task) {
    const int64_t end = std::min(plan.T, (task + 1) * kCombineTokens);
    for (int64_t t = task * kCombineTokens; t < end; ++t) {
      void* out = const_cast<char*>(at(y, dtype, t * H));
      kernels.combine(
          {plan.k, H, rows, plan.slots.get() + t * plan.k, weighted ? plan.weights + t * plan.k : nullptr, out, dtype});
    }
  });
}

}  // namespace moert::cpu
