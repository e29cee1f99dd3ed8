// What the forward and the backward of fused_experts share: memory between the kernels and the products of w1 and w2.
#pragma once

#include "cuda/grouped_gemm_product.h"
#include "cuda/memory.h"
#include "moert/check.h"
#include "moert/fused_experts.h"
#include "moert/permute.h"

namespace moert::cuda {

// These kernels sort the ids themselves and add nothing to the sums.
inline void check_alone(const RoutedRows& r) {
  MOERT_CHECK(!r.offsets && !r.onto.rows.data && r.onto.C == 0, "offsets, onto_rows and mix must be None on a GPU");
}

// The routing in slot order.
template <typename T>
struct SlotPlan {
  int32_t *offsets, *tokens, *slots;  // [E+1], [T*k], [T, k], as permute_plan gives them
  Acc<T>* scale;                      // [T*k], the routing weight of each slot; null where none is asked for
  void* workspace;                    // of permute_plan

  SlotPlan(const RoutedRows& r, int64_t E, bool scaled, Memory& memory)
      : offsets(memory.take<int32_t>(E + 1)),
        tokens(memory.take<int32_t>(r.T * r.k)),
        slots(memory.take<int32_t>(r.T * r.k)),
        scale(scaled ? memory.take<Acc<T>>(r.T * r.k) : nullptr),
        workspace(memory.take<char>(permute_plan_workspace(r.T, r.k, E))) {}

  void run(const RoutedRows& r, int64_t E, void* stream) const;
};

// y [slots, I] = the activation of the first product's rows; h (may be null) = the pre-activations, gate then up.
template <typename T>
Product<T> first_product(const RoutedRows& tokens, const ExpertWeights& w, const SlotPlan<T>& plan, T* y, T* h) {
  const bool gated = is_gated(w.activation.act);
  Epilogue<T> to{y, w.I, w.I};
  to.bias = static_cast<const T*>(w.gate_bias.data);
  to.up_bias = static_cast<const T*>(w.up_bias.data);
  to.bias_expert = w.gate_bias.expert_stride;
  to.bias_step = w.bias1_stride;
  to.scale = w.scale_on == ScaleOn::input ? plan.scale : nullptr;
  to.scale_input = true;
  to.activates = true;
  to.form = activation_form<Acc<T>>(w.activation);
  to.h = h;
  const Rows x{tokens.x.data, tokens.x.dtype, tokens.x.stride, plan.tokens, tokens.T};
  return {int32_t(tokens.T * tokens.k),
          int32_t(w.E),
          w.I,
          w.H,
          plan.offsets,
          RowsOf<T>(x),
          MatrixOf<const T>(w.gate),
          MatrixOf<const T>(gated ? w.up : w.gate),
          to,
          nullptr,
          tokens.batch_invariant};
}

}  // namespace moert::cuda
