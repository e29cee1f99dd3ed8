// Gradients of the expert FFN.  With g = dy . down (per slot), act the activation, w the routing weight of the slot:
//   scale_on output:  dact = w g      dw = <g, act> + <dy, b2>     x's gradient is dh . w1, w1's is dh^T x
//   scale_on input:   dact = g        dw = <x, dh . w1>            x's gradient is w dh . w1, w1's is (w dh)^T x
#include "cpu/fused_experts_steps.h"
#include "cpu/weight_gradient.h"

namespace moert::cpu {

namespace {

template <typename A>
struct Backward {
  const Rows& dy;
  const RoutedRows& tokens;
  const ExpertWeights& w;
  const ExpertGradients& gradients;
  int64_t threads;
  const GemmKernels& kernels;
  Plan<A> plan;
  DType between;
  bool gated, scale_output;
  int64_t slots, h_width;
  Rows dy_slots, x_slots;  // [slots, H]

  Backward(const Rows& dy, const RoutedRows& tokens, const ExpertWeights& w, const ExpertGradients& gradients,
           int64_t threads)
      : dy(dy),
        tokens(tokens),
        w(w),
        gradients(gradients),
        threads(threads),
        kernels(gemm_kernels()),
        plan(tokens, w.E, threads),
        between(between_gemms(tokens.x.dtype)),
        gated(is_gated(w.activation.act)),
        scale_output(w.scale_on == ScaleOn::output),
        slots(plan.slots_used()),
        h_width(gated ? 2 * w.I : w.I),
        dy_slots(gathered(dy, plan)),
        x_slots(gathered(tokens.x, plan)) {}

  // dh [slots, 2I]; act [slots, I] (or null) = w act; sums [tiles of I, slots] = parts of <g, act>.
  void activation_backward(Team& team, const std::vector<TileTask>& tasks, const void* h, void* dh, void* act,
                           A* sums) const {
    team.for_each(int64_t(tasks.size()), [&](int64_t i) {
      const TileTask& task = tasks[i];
      const TileMemory<A> memory = tile_memory<A>();
      const TileOperand down = operand_of(w.down, task.expert, 0, task.n, false);
      kernels.gemm({task.M, task.N, w.H, operand_of(dy_slots, task.row, 0), down, memory.c2, memory.scratch});
      const auto load_half = [&](int64_t column, A* c) {
        const int64_t skip = task.row * h_width + column + task.n;
        kernels.widen({at(h, tokens.x.dtype, skip), tokens.x.dtype, h_width, 1, nullptr}, task.M, task.N, c,
                      kTileColumns);
      };
      load_half(0, memory.c0);
      if (gated) load_half(w.I, memory.c1);
      const auto part = [&](void* p, int64_t skip) { return const_cast<char*>(at(p, between, skip)); };
      const int64_t first = task.row * h_width + task.n;
      kernels.activate_backward({task.M, task.N, w.activation, memory.c0, memory.c1, memory.c2,
                                 scale_output ? plan.scale.get() + task.row : nullptr, between, part(dh, first),
                                 part(dh, first + w.I), h_width, act ? part(act, task.row * w.I + task.n) : nullptr,
                                 w.I, sums + task.n / kTileColumns * slots + task.row});
    });
  }

  // A tile of dh . w1, in memory.c0.
  void input_tile(const TileTask& task, const TileMemory<A>& memory, const Rows& halves) const {
    const auto half = [&](const ExpertMatrix& weight, int64_t column, bool accumulate) {
      const TileOperand b = operand_of(weight, task.expert, 0, task.n, false);
      kernels.gemm(
          {task.M, task.N, w.I, operand_of(halves, task.row, column), b, memory.c0, memory.scratch, accumulate});
    };
    half(w.gate, 0, false);
    if (gated) half(w.up, w.I, true);
  }

  // f(slot, i) for every kept choice i = t * k + j, tokens over threads.
  template <typename F>
  void for_choices(Team& team, const F& f) const {
    team.for_each(tokens.T, [&](int64_t t) {
      for (int64_t i = t * tokens.k; i < (t + 1) * tokens.k; ++i) f(plan.slots[i], i);
    });
  }

  // <row t of a, b>, as many columns at a time as the thread has memory for.
  A dot_with(const Rows& a, int64_t t, TileMatrix b) const {
    const TileMemory<A> memory = tile_memory<A>();
    A sum = 0;
    for (int64_t n = 0; n < w.H; n += kTileColumns) {
      const int64_t N = std::min(kTileColumns, w.H - n);
      kernels.widen({at(a.data, a.dtype, t * a.stride + n), a.dtype, 0, 1, nullptr}, 1, N, memory.row0, 0);
      kernels.widen(b, 1, N, memory.row1, 0);
      A part;
      kernels.dot(memory.row0, memory.row1, N, sizeof(A) == 8, &part);
      sum += part;
      b.data = at(b.data, b.dtype, N);
    }
    return sum;
  }

  // dweights where the weight scales the output; the tiles' sums are added in order.
  void output_weight_gradient(Team& team, const A* sums) const {
    A* dweights = static_cast<A*>(gradients.dweights);
    const int64_t tiles = (w.I + kTileColumns - 1) / kTileColumns;
    for_choices(team, [&](int64_t slot, int64_t i) {
      A sum = 0;
      for (int64_t tile = 0; slot >= 0 && tile < tiles; ++tile) sum += sums[tile * slots + slot];
      if (slot >= 0 && w.down_bias.data) {
        const char* bias = at(w.down_bias.data, w.down_bias.dtype, tokens.ids[i] * w.down_bias.expert_stride);
        sum += dot_with(dy, i / tokens.k, {bias, w.down_bias.dtype, 0, 1, nullptr});
      }
      dweights[i] = sum;
    });
  }

  // dweights where the weight scales the input.
  void input_weight_gradient(Team& team, const A* rows) const {
    A* dweights = static_cast<A*>(gradients.dweights);
    for_choices(team, [&](int64_t slot, int64_t i) {
      const TileMatrix row{rows + std::max<int64_t>(slot, 0) * w.H, DTypeOf<A>::value, 0, 1, nullptr};
      dweights[i] = slot < 0 ? 0 : dot_with(tokens.x, i / tokens.k, row);
    });
  }

  // out[e, n] (+)= sum over the slots of e of (scale *) rows[s, n], columns over threads.
  void sum_rows(Team& team, const Rows& rows, bool scaled, int64_t columns, const ExpertVector& out, int64_t out_stride,
                bool accumulate) const {
    if (!out.data) return;
    const int64_t blocks = (columns + kTileColumns - 1) / kTileColumns;
    team.for_each(w.E * blocks, [&](int64_t i) {
      const int64_t e = i / blocks, n = i % blocks * kTileColumns, N = std::min(kTileColumns, columns - n);
      if (accumulate && plan.offsets[e] == plan.offsets[e + 1]) return;
      const TileMemory<A> memory = tile_memory<A>();
      std::fill(memory.row0, memory.row0 + N, A(0));
      for (int64_t s = plan.offsets[e]; s < plan.offsets[e + 1]; ++s) {
        kernels.widen(tile_of(rows, s, n), 1, N, memory.row1, 0);
        const A scale = scaled ? plan.scale[s] : A(1);
        for (int64_t c = 0; c < N; ++c) memory.row0[c] += scale * memory.row1[c];
      }
      void* to = const_cast<char*>(at(out.data, out.dtype, e * out.expert_stride + n * out_stride));
      StoreTile sums{1, N, memory.row0, nullptr, nullptr, ScaleOn::output, to, out.dtype, 0, out_stride};
      sums.accumulate = accumulate;
      kernels.store(sums);
    });
  }

  void scale_rows(Team& team, const Rows& dh) const {
    team.for_each(slots, [&](int64_t s) {
      A* row = tile_memory<A>().row0;
      for (int64_t n = 0; n < h_width; n += kTileColumns) {
        const int64_t N = std::min(kTileColumns, h_width - n);
        const TileMatrix part = tile_of(dh, s, n);
        kernels.widen(part, 1, N, row, 0);
        kernels.store(
            {1, N, row, nullptr, plan.scale.get() + s, ScaleOn::output, const_cast<void*>(part.data), between, 0, 1});
      }
    });
  }

  WeightGradient<A> weight_gradient(int64_t N, int64_t K, const Rows& left, const Rows& right, const ExpertMatrix& out,
                                    bool accumulate) const {
    return WeightGradient<A>({slots, w.E, N, K, plan.offsets, left, right, false, accumulate}, out);
  }

  void run(const void* saved) const {
    const Memory<char> recomputed = saved ? nullptr : allocate<char>(slots * h_width * size_of(tokens.x.dtype));
    const FirstGemm<A> first(tokens, w, plan, threads, nullptr, recomputed.get());
    const int64_t tiles = (w.I + kTileColumns - 1) / kTileColumns;
    const Memory<A> sums = allocate<A>(tiles * slots);
    const Memory<char> dh = allocate<char>(slots * h_width * size_of(between));
    const Memory<char> act = gradients.ddown.data ? allocate<char>(slots * w.I * size_of(between)) : nullptr;
    const Rows dgate{dh.get(), between, h_width}, dup{at(dh.get(), between, w.I), between, h_width};
    const auto h_tasks = tile_tasks(plan.offsets, w.E, 0, w.I, kTileColumns, 1);
    const bool row_weights = gradients.dweights && !scale_output;
    const CombinedRows<A> rows(plan, gradients.dx || row_weights ? w.H : 0, threads, row_weights);
    const auto& onto = gradients.accumulate;
    const auto ddown = weight_gradient(w.H, w.I, dy_slots, {act.get(), between, w.I}, gradients.ddown, onto.w2);
    const auto dgate_weight = weight_gradient(w.I, w.H, dgate, x_slots, gradients.dgate, onto.w1);
    const auto dup_weight = weight_gradient(w.I, w.H, dup, x_slots, gradients.dup, onto.w1);

    parallel_region(threads, [&](Team& team) {
      if (!saved) first.run(team);
      activation_backward(team, h_tasks, saved ? saved : recomputed.get(), dh.get(), act.get(), sums.get());
      ddown.run(team);
      sum_rows(team, dy_slots, scale_output, w.H, gradients.ddown_bias, 1, onto.b2);
      sum_rows(team, dgate, false, w.I, gradients.dgate_bias, w.bias1_stride, onto.b1);
      if (gated) sum_rows(team, dup, false, w.I, gradients.dup_bias, w.bias1_stride, onto.b1);
      if (gradients.dweights && scale_output) output_weight_gradient(team, sums.get());
      rows.run(team, !scale_output, gradients.dx, tokens.x.dtype,
               [&](const TileTask& task, const TileMemory<A>& memory) -> const A* {
                 input_tile(task, memory, dgate);
                 return nullptr;
               });
      if (row_weights) input_weight_gradient(team, rows.rows.get());
      if (!scale_output) scale_rows(team, dgate);
      dgate_weight.run(team);
      dup_weight.run(team);
    });
  }
};

}  // namespace

void fused_experts_backward(const Rows& dy, const RoutedRows& tokens, const ExpertWeights& experts, const void* h,
                            int64_t threads, const ExpertGradients& gradients) {
  if (tokens.x.dtype == DType::f64)
    Backward<double>(dy, tokens, experts, gradients, threads).run(h);
  else
    Backward<float>(dy, tokens, experts, gradients, threads).run(h);
}

}  // namespace moert::cpu
