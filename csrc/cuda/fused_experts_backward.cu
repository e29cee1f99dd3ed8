// Gradients of the expert FFN out of grouped products; cpu/fused_experts_backward.cpp has the formulas.
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
  const bool gated, scale_output;
  const int64_t S, width;
  Memory memory;
  SlotPlan<T> plan;
  T *recomputed, *act, *g, *dh, *rows;  // [S, width], [S, I], [S, I], [S, width], [S, H]
  A* dots;                              // [S]
  void* groups;                         // of a product

  Backward(const Rows& dy, const RoutedRows& tokens, const ExpertWeights& w, const ExpertGradients& out, bool saved,
           void* workspace)
      : dy(dy),
        tokens(tokens),
        w(w),
        out(out),
        gated(is_gated(w.activation.act)),
        scale_output(w.scale_on == ScaleOn::output),
        S(tokens.T * tokens.k),
        width(gated ? 2 * w.I : w.I),
        memory(workspace),
        plan(tokens, w.E, true, memory),
        recomputed(saved ? nullptr : memory.take<T>(S * width)),
        act(memory.take<T>(S * w.I)),
        g(memory.take<T>(S * w.I)),
        dh(memory.take<T>(S * width)),
        rows(out.dx || (out.dweights && !scale_output) ? memory.take<T>(S * w.H) : nullptr),
        dots(memory.take<A>(S)),
        groups(memory.take<char>(grouped_gemm_workspace(w.E))) {}

  // y = x . m^T for rows in slot order.
  void times(const Rows& x, const ExpertMatrix& m, int64_t N, int64_t K, T* y, void* stream) const {
    GroupedGemm p{};
    p.S = S, p.E = w.E, p.N = N, p.K = K, p.offsets = plan.offsets, p.x = x, p.w = m;
    p.workspace = groups;
    multiply(product_of<T>(p, y, N), false, stream);
  }

  void weight_gradient(const Rows& left, const Rows& right, int64_t N, int64_t K, const ExpertMatrix& dw,
                       void* stream) const {
    multiply(
        Gradient<T>{int32_t(S), int32_t(w.E), N, K, plan.offsets, RowsOf<T>(left), RowsOf<T>(right), MatrixOf<T>(dw)},
        false, stream);
  }

  void bias_gradient(const Rows& from, const A* scale, int64_t N, const ExpertVector& db, void* stream) const {
    if (!db.data) return;
    launch(&slot_sums<T>, {w.E * ceil_div(N, kWarp)}, kRowThreads, stream,
           SlotSums<T>{int32_t(S), int32_t(w.E), N, plan.offsets, static_cast<const T*>(from.data), from.stride,
                       from.index, scale, static_cast<T*>(const_cast<void*>(db.data)), db.expert_stride});
  }

  void routing_gradient(void* stream) const {
    ChoiceDots<T> p{tokens.k, w.H, plan.slots, nullptr, nullptr, nullptr, nullptr, 0, 0, static_cast<A*>(out.dweights)};
    if (scale_output) {
      p.ids = tokens.ids, p.start = dots;
      p.a = static_cast<const T*>(dy.data), p.a_stride = dy.stride;
      p.b = static_cast<const T*>(w.down_bias.data), p.b_stride = w.down_bias.expert_stride;
    } else {
      p.a = static_cast<const T*>(tokens.x.data), p.a_stride = tokens.x.stride;
      p.b = rows, p.b_stride = w.H;
    }
    launch(&choice_dots<T>, {S}, kRowThreads, stream, p);
  }

  void run(const T* saved, void* stream) const {
    const Rows x_slots{tokens.x.data, kType, tokens.x.stride, plan.tokens};
    const Rows dy_slots{dy.data, kType, dy.stride, plan.tokens};
    const Rows dh_slots{dh, kType, width}, act_slots{act, kType, w.I};
    const Whole w1 = whole(w.gate, w.up, w.I, gated);
    const A* scale = scale_output ? plan.scale : nullptr;

    plan.run(tokens, w.E, stream);
    if (!saved) multiply(first_product(tokens, w, plan, act, recomputed), false, stream);
    times(dy_slots, turned(w.down), w.I, w.H, g, stream);
    launch(&activation_backward<T>, {S}, kRowThreads, stream,
           ActivationBackward<T>{int32_t(S), int32_t(w.E), w.I, plan.offsets, saved ? saved : recomputed, g, scale,
                                 activation_form<A>(w.activation), w1.alternate, dh, act, dots});
    if (out.ddown.data) weight_gradient(dy_slots, act_slots, w.H, w.I, out.ddown, stream);
    bias_gradient(dy_slots, scale, w.H, out.ddown_bias, stream);
    bias_gradient(dh_slots, nullptr, width, out.dgate_bias, stream);
    if (rows) times(dh_slots, turned(w1.matrix), w.H, width, rows, stream);
    if (out.dx)
      unpermute_rows(rows, w.H, kType, plan.slots, scale_output ? nullptr : tokens.weights, nullptr, 0, tokens.T,
                     tokens.k, S, w.H, stream, out.dx);
    if (out.dweights) routing_gradient(stream);
    if (!out.dgate.data) return;
    if (!scale_output) launch(&scale_rows<T>, {S}, kRowThreads, stream, plan.offsets + w.E, plan.scale, width, dh);
    weight_gradient(dh_slots, x_slots, width, w.H, whole(out.dgate, out.dup, w.I, gated).matrix, stream);
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
  check_alone(tokens);
  const auto& added = gradients.accumulate;
  MOERT_CHECK(!(added.w1 || added.w2 || added.b1 || added.b2), "accumulate must be false on a GPU, got true");
  with_dtype(tokens.x.dtype, [&](auto type) {
    using T = decltype(type);
    Backward<T>(dy, tokens, experts, gradients, h, workspace).run(static_cast<const T*>(h), stream);
  });
}

}  // namespace moert::cuda
