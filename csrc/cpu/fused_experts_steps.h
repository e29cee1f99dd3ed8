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

constexpr int64_t kCombineTokens = 16;  // a task of the combine

// Rows between a GEMM and its combine: 32 MB of float32 for two threads, a last-level cache's worth.
constexpr int64_t kSliceValues = 8 << 20;

// The routing in slot order.
template <typename A>
struct Plan {
  int64_t T, k, E, S;
  Memory<int32_t> own;                      // all three, unless the caller has a plan
  const int32_t *offsets, *tokens, *slots;  // as permute_plan gives them
  Memory<A> scale;                          // [slots used]: routing weight of each slot
  const A* weights;                         // [T, k]

  Plan(const RoutedRows& r, int64_t E, int64_t threads)
      : T(r.T), k(r.k), E(E), S(r.offsets ? r.S : T * k), weights(static_cast<const A*>(r.weights)) {
    if (r.offsets) {
      offsets = r.offsets, tokens = r.tokens, slots = r.slots;
      check_plan(r.ids, T, k, E, S, offsets, tokens, slots);
    } else {
      own = allocate<int32_t>(E + 1 + 2 * T * k);
      int32_t *first = own.get(), *token = first + E + 1, *slot = token + T * k;
      permute_plan(r.ids, T, k, E, -1, threads, first, token, slot);
      offsets = first, tokens = token, slots = slot;
    }
    scale = allocate<A>(slots_used());
    for (int64_t i = 0; i < T * k; ++i)
      if (slots[i] >= 0) scale[slots[i]] = weights[i];
  }

  int64_t slots_used() const { return offsets[E]; }
};

// The rows of x in slot order.
template <typename A>
Rows gathered(const Rows& x, const Plan<A>& plan) {
  return {x.data, x.dtype, x.stride, plan.tokens};
}

// Elements [n, n + N) of an expert's vector as values in `row`, or null where there is none.
template <typename A>
const A* vector_of(const ExpertVector& v, int64_t stride, const TileTask& task, A* row) {
  if (!v.data) return nullptr;
  const char* data = at(v.data, v.dtype, task.expert * v.expert_stride + task.n * stride);
  gemm_kernels().widen({data, v.dtype, 0, stride, nullptr}, 1, task.N, row, 0);
  return row;
}

// The first GEMM: act [slots, I] (may be null), of dtype `between` = activation of the pre-activations; h (may be null)
// [slots, 2I] = the pre-activations, gate then up.
template <typename A>
struct FirstGemm {
  const ExpertWeights& w;
  const Plan<A>& plan;
  Rows x;  // [slots, H]
  void *act, *h;
  bool gated, batch_invariant;
  DType between;
  int64_t numbers;  // GemmTile::same_a of the rows of x
  std::vector<TileTask> tasks;

  FirstGemm(const RoutedRows& tokens, const ExpertWeights& w, const Plan<A>& plan, int64_t threads, void* act, void* h)
      : w(w),
        plan(plan),
        x(gathered(tokens.x, plan)),
        act(act),
        h(h),
        gated(is_gated(w.activation.act)),
        batch_invariant(tokens.batch_invariant),
        between(between_gemms(x.dtype)),
        numbers(new_numbers(plan.S)),
        tasks(tile_tasks(plan.offsets, w.E, 0, w.I, gated ? kHalfColumns : kTileColumns, threads)) {}

  void run(Team& team) const {
    run(team, [&](const TileTask& task, const TileMemory<A>& memory) {
      const TileOperand gate = operand_of(w.gate, task.expert, task.n, 0, true);
      GemmTile tile{task.M, task.N, w.H, operand_of(x, task.row, 0), gate, memory.c0, memory.scratch};
      if (gated) tile.b2 = operand_of(w.up, task.expert, task.n, 0, true), tile.c2 = memory.c1;
      tile.batch_invariant = batch_invariant;
      tile.same_a = numbers + task.row;
      gemm_kernels().gemm(tile);
    });
  }

  // gemm(task, memory) leaves the gate half of a tile in memory.c0 and its up half in memory.c1.
  template <typename F>
  void run(Team& team, const F& gemm) const {
    team.for_each(
        int64_t(tasks.size()),
        [&](int64_t i) {
          const TileMemory<A> memory = tile_memory<A>();
          gemm(tasks[i], memory);
          finish(tasks[i], memory);
        },
        in_runs(tasks));
  }

  void finish(const TileTask& task, const TileMemory<A>& memory) const {
    finish(task, w.gate_bias, memory.c0, 0, memory);
    if (gated) finish(task, w.up_bias, memory.c1, w.I, memory);
    if (!act) return;
    void* out = const_cast<char*>(at(act, between, task.row * w.I + task.n));
    gemm_kernels().activate({task.M, task.N, w.activation, memory.c0, memory.c1, out, between, w.I});
  }

  // Scale and bias of a half, which begins at `column` of h; and its copy in h.
  void finish(const TileTask& task, const ExpertVector& bias, A* c, int64_t column, const TileMemory<A>& memory) const {
    const A* scale = w.scale_on == ScaleOn::input ? plan.scale.get() + task.row : nullptr;
    const A* b = vector_of(bias, w.bias1_stride, task, memory.row0);
    const StoreTile in_place{task.M, task.N, c, b, scale, ScaleOn::input, c, DTypeOf<A>::value, kTileColumns, 1};
    if (b || scale) gemm_kernels().store(in_place);
    if (!h) return;
    const int64_t h_stride = gated ? 2 * w.I : w.I;
    void* out = const_cast<char*>(at(h, x.dtype, task.row * h_stride + column + task.n));
    gemm_kernels().store({task.M, task.N, c, nullptr, nullptr, ScaleOn::output, out, x.dtype, h_stride, 1});
  }
};

// y[t] = sum over the kept choices of (weight *) rows[slot], in choice order.  The rows [slots, H] are computed and
// combined a slice of columns at a time, so that what lies in between stays small.
template <typename A>
struct CombinedRows {
  const Plan<A>& plan;
  int64_t H, width;
  int64_t numbers;  // GemmTile::same_a of the rows that the products have in common
  Memory<A> rows;   // [slots, width], of one slice
  std::vector<std::vector<TileTask>> slices;

  // One slice if `whole`; nothing to do where H is 0.
  CombinedRows(const Plan<A>& plan, int64_t H, int64_t threads, bool whole = false)
      : plan(plan), H(H), numbers(new_numbers(plan.S)) {
    const int64_t slots = plan.slots_used(), budget = kSliceValues * std::max<int64_t>(1, threads / 2);
    const int64_t tiles = std::max<int64_t>(1, budget / std::max<int64_t>(1, slots) / kTileColumns);
    width = whole ? H : std::min(H, tiles * kTileColumns);
    rows = allocate<A>(slots * width);
    for (int64_t n = 0; n < H; n += width)
      slices.push_back(tile_tasks(plan.offsets, plan.E, n, std::min(H, n + width), kTileColumns, threads));
  }

  // gemm(task, memory) leaves a tile in memory.c0 and may return a bias for it.
  template <typename F>
  void run(Team& team, bool weighted, void* y, DType dtype, const F& gemm, const Onto& onto = {}) const {
    for (int64_t n = 0; n < H; n += width) {
      const std::vector<TileTask>& tasks = slices[n / width];
      const auto multiply = [&](int64_t i) {
        const TileTask& task = tasks[i];
        const TileMemory<A> memory = tile_memory<A>();
        const A* bias = gemm(task, memory);
        gemm_kernels().store({task.M, task.N, memory.c0, bias, nullptr, ScaleOn::output,
                              rows.get() + task.row * width + task.n - n, DTypeOf<A>::value, width, 1});
      };
      team.for_each(int64_t(tasks.size()), multiply, in_runs(tasks));
      if (y) combine(team, weighted, n, y, dtype, onto);
    }
  }

  void combine(Team& team, bool weighted, int64_t n, void* y, DType dtype, const Onto& onto) const {
    const A *scale = static_cast<const A*>(onto.scale), *mix = static_cast<const A*>(onto.mix);
    team.for_each((plan.T + kCombineTokens - 1) / kCombineTokens, [&](int64_t task) {
      const int64_t end = std::min(plan.T, (task + 1) * kCombineTokens);
      for (int64_t t = task * kCombineTokens; t < end; ++t) {
        void* out = const_cast<char*>(at(y, dtype, t * H + n));
        CombineRow row{plan.k,
                       std::min(width, H - n),
                       rows.get(),
                       width,
                       plan.slots + t * plan.k,
                       weighted ? plan.weights + t * plan.k : nullptr,
                       out,
                       dtype};
        if (onto.rows.data) row.onto = at(onto.rows.data, dtype, t * onto.rows.stride + n);
        if (onto.rows.data && scale) row.onto_scale = scale + t;
        if (onto.C > 0) {
          row.C = onto.C, row.mix = mix + t * onto.C;
          row.constants = at(onto.constants, dtype, n), row.constants_stride = H;
        }
        gemm_kernels().combine(row);
      }
    });
  }
};

}  // namespace moert::cpu
