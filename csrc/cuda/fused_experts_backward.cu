// Gradients of the expert FFN out of grouped products; cpu/fused_experts_backward.cpp has the formulas.  What is saved
// is x, the pre-activations and the routing; the activation is computed again in the epilogue of dy . w2.
#include <algorithm>

#include "cuda/activation_backward.h"
#include "cuda/fused_experts.cuh"
#include "cuda/fused_experts.h"
#include "cuda/launch.h"

namespace moert::cuda {

namespace {

// The gate and the up half of w1 as the one matrix [E, 2I, H] that they are halves of.
struct Whole {
  ExpertMatrix matrix;
  bool alternate;
};

Whole whole(const ExpertMatrix& gate, const ExpertMatrix& up, int64_t I, bool gated) {
  if (!gated) return {gate, false};
  const int64_t apart = (static_cast<const char*>(up.data) - static_cast<const char*>(gate.data)) / size_of(gate.dtype);
  ExpertMatrix matrix = gate;
  const bool alternate = I > 1 && apart * 2 == gate.row_stride;
  if (alternate || I == 1) matrix.row_stride = apart;
  MOERT_CHECK(alternate || apart == I * matrix.row_stride,
              "w1 must hold its gate and up rows one after the other or in turns, got halves that are ", apart,
              " elements apart");
  return {matrix, alternate};
}

ExpertMatrix turned(const ExpertMatrix& m) {
  ExpertMatrix t = m;
  t.row_stride = m.col_stride, t.col_stride = m.row_stride;
  return t;
}

template <typename T>
struct Backward {
  using A = Acc<T>;
  static constexpr DType kType = DTypeOf<T>::value;

  const Rows& dy;
  const RoutedRows& tokens;
  const ExpertWeights& w;
  const ExpertGradients& out;
  const bool gated, scale_output, needs_act, needs_rows;
  Memory memory;
  SlotPlan<T> plan;
  const int64_t S, width;
  T *recomputed, *dh;  // [S, width]
  T* act;              // [S, I]
  T* rows;             // [S, H], in the place of act: dy . w2's is read by then
  A* dots;             // as ActivationBackward has them
  void* groups;        // of a product

  Backward(const Rows& dy, const RoutedRows& tokens, const ExpertWeights& w, const ExpertGradients& out, bool saved,
           void* workspace)
      : dy(dy),
        tokens(tokens),
        w(w),
        out(out),
        gated(is_gated(w.activation.act)),
        scale_output(w.scale_on == ScaleOn::output),
        needs_act(!saved || out.ddown.data),
        needs_rows(out.dx || (out.dweights && !scale_output)),
        memory(workspace),
        plan(tokens, w.E, true, memory),
        S(plan.S),
        width(gated ? 2 * w.I : w.I),
        recomputed(saved ? nullptr : memory.take<T>(S * width)),
        dh(memory.take<T>(S * width)),
        act(memory.take<T>(S * std::max(needs_act ? w.I : 0, needs_rows ? w.H : 0))),
        rows(act),
        dots(out.dweights && scale_output ? memory.take<A>(S * ceil_div(w.I, kDotColumns)) : nullptr),
        groups(memory.take<char>(grouped_gemm_workspace(w.E))) {}

  // y = x . m^T for rows in slot order.
  void times(const Rows& x, const ExpertMatrix& m, int64_t N, int64_t K, T* y, void* stream) const {
    GroupedGemm p{};
    p.S = S, p.E = w.E, p.N = N, p.K = K, p.offsets = plan.offsets, p.x = x, p.w = m;
    p.workspace = groups;
    p.batch_invariant = tokens.batch_invariant;
    multiply(product_of<T>(p, y, N), tokens.tf32, stream);
  }

  // dh, act and dots, from the pre-activations.
  void activation_backward(const Rows& dy_slots, const T* h, bool alternate, void* stream) const {
    const ActivationBackward<T> to{w.I,       h,  scale_output ? plan.scale : nullptr, activation_form<A>(w.activation),
                                   alternate, dh, out.ddown.data ? act : nullptr,      dots};
    const MatrixOf<const T> down(turned(w.down));
    multiply(Product<T, ActivationBackward<T>>{int32_t(S), int32_t(w.E), w.I, w.H, plan.offsets, RowsOf<T>(dy_slots),
                                               down, down, to},
             tokens.tf32, stream);
  }

  void weight_gradient(const Rows& left, const Rows& right, int64_t N, int64_t K, const ExpertMatrix& dw,
                       bool accumulate, void* stream) const {
    if (!dw.data) return;
    const GroupedGemmWgrad p{S, w.E, N, K, plan.offsets, left, right, tokens.tf32, accumulate};
    multiply(gradient_of<T>(p, dw), p.tf32, stream);
  }

  void bias_gradient(const Rows& from, const A* scale, int64_t N, const ExpertVector& db, bool accumulate,
                     void* stream) const {
    if (!db.data) return;
    void* data = const_cast<void*>(db.data);
    launch(&slot_sums<T>, {w.E * ceil_div(N, kWarp)}, kRowThreads, stream,
           SlotSums<T>{int32_t(S), int32_t(w.E), N, plan.offsets, RowsOf<T>(from), scale, static_cast<T*>(data),
                       accumulate ? static_cast<A*>(data) : nullptr, db.expert_stride});
  }

  void routing_gradient(void* stream) const {
    if (!out.dweights) return;
    ChoiceDots<T> p{};
    p.choices = tokens.T * tokens.k, p.k = tokens.k, p.N = w.H, p.slots = plan.slots;
    p.S = S, p.rows = scale_output ? w.E : S, p.out = static_cast<A*>(out.dweights);
    if (scale_output) {
      p.ids = tokens.ids, p.parts = dots, p.num_parts = ceil_div(w.I, kDotColumns);
      p.a = static_cast<const T*>(dy.data), p.a_stride = dy.stride;
      p.b = static_cast<const T*>(w.down_bias.data), p.b_stride = w.down_bias.expert_stride;
    } else {
      p.a = static_cast<const T*>(tokens.x.data), p.a_stride = tokens.x.stride;
      p.b = rows, p.b_stride = w.H;
    }
    launch(&choice_dots<T>, {ceil_div(p.choices, kRowThreads / kWarp)}, kRowThreads, stream, p);
  }

  void run(const T* saved, void* stream) const {
    const Rows x_slots = in_slot_order(tokens.x, tokens, plan), dy_slots = in_slot_order(dy, tokens, plan);
    const Rows dh_slots{dh, kType, width}, act_slots{act, kType, w.I};
    const Whole w1 = whole(w.gate, w.up, w.I, gated);
    const auto& added = out.accumulate;

    plan.run(tokens, w.E, stream);
    if (!saved) {
      Product<T> first = first_product(tokens, w, plan, act, recomputed);
      first.workspace = groups;
      multiply(first, tokens.tf32, stream);
    }
    activation_backward(dy_slots, saved ? saved : recomputed, w1.alternate, stream);
    weight_gradient(dy_slots, act_slots, w.H, w.I, out.ddown, added.w2, stream);
    bias_gradient(dy_slots, scale_output ? plan.scale : nullptr, w.H, out.ddown_bias, added.b2, stream);
    bias_gradient(dh_slots, nullptr, width, out.dgate_bias, added.b1, stream);
    if (needs_rows) times(dh_slots, turned(w1.matrix), w.H, width, rows, stream);
    if (out.dx)
      unpermute_rows(rows, w.H, kType, plan.slots, scale_output ? nullptr : tokens.weights, nullptr, 0, tokens.T,
                     tokens.k, S, w.H, stream, out.dx);
    routing_gradient(stream);
    if (!out.dgate.data) return;
    if (!scale_output) launch(&scale_rows<T>, {S}, kRowThreads, stream, plan.offsets + w.E, plan.scale, width, dh);
    weight_gradient(dh_slots, x_slots, width, w.H, whole(out.dgate, out.dup, w.I, gated).matrix, added.w1, stream);
  }
};

}  // namespace

int64_t fused_experts_backward_workspace(const RoutedRows& tokens, const ExpertWeights& experts, bool saved,
                                         const ExpertGradients& gradients) {
  int64_t bytes = 0;
  const Rows dy{};
  with_dtype(tokens.x.dtype, [&](auto type) {
    bytes = Backward<decltype(type)>(dy, tokens, experts, gradients, saved, nullptr).memory.used();
  });
  return bytes;
}

void fused_experts_backward(const Rows& dy, const RoutedRows& tokens, const ExpertWeights& experts, const void* h,
                            void* workspace, void* stream, const ExpertGradients& gradients) {
  with_dtype(tokens.x.dtype, [&](auto type) {
    using T = decltype(type);
    Backward<T>(dy, tokens, experts, gradients, h, workspace).run(static_cast<const T*>(h), stream);
  });
}

}  // namespace moert::cuda
