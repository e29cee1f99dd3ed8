// What the forward and the backward of fused_experts share: memory between the kernels and the products of w1 and w2.
#pragma once

#include "cuda/grouped_gemm_product.h"
#include "cuda/memory.h"
#include "moert/check.h"
#include "moert/fused_experts.h"
#include "moert/permute.h"

namespace moert::cuda {

// Kernels over packed weights sort the ids themselves and add nothing to the sums.
inline void check_alone(const RoutedRows& r) {
  MOERT_CHECK(!r.offsets && !r.onto.rows.data && r.onto.C == 0,
              "offsets, onto_rows and mix must be None over packed weights on a GPU");
}

// The routing in slot order: the caller's, or of the ids.
template <typename T>
struct SlotPlan {
  int64_t S;
  const int32_t *offsets, *tokens, *slots;  // [E+1], [S], [T, k], as permute_plan gives them
  Acc<T>* scale;                            // [S], the routing weight of each slot; null where none is asked for
  void* workspace;                          // of permute_plan

  SlotPlan(const RoutedRows& r, int64_t E, bool scaled, Memory& memory)
      : S(r.offsets ? r.S : r.T * r.k),
        offsets(r.offsets ? r.offsets : memory.take<int32_t>(E + 1)),
        tokens(r.offsets ? r.tokens : memory.take<int32_t>(S)),
        slots(r.offsets ? r.slots : memory.take<int32_t>(S)),
        scale(scaled ? memory.take<Acc<T>>(S) : nullptr),
        workspace(r.offsets ? nullptr : memory.take<char>(permute_plan_workspace(r.T, r.k, E))) {}

  void run(const RoutedRows& r, int64_t E, void* stream) const;
};

// Rows of the tokens in slot order.  What a caller's plan says is not known: no row outside the tokens is read.
template <typename T>
Rows in_slot_order(const Rows& rows, const RoutedRows& tokens, const SlotPlan<T>& plan) {
  return {rows.data, rows.dtype, rows.stride, plan.tokens, tokens.T};
}

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
  return {int32_t(plan.S),
          int32_t(w.E),
          w.I,
          w.H,
          plan.offsets,
          RowsOf<T>(in_slot_order(tokens.x, tokens, plan)),
          MatrixOf<const T>(w.gate),
          MatrixOf<const T>(gated ? w.up : w.gate),
          to,
          nullptr,
          tokens.batch_invariant};
}

}  // namespace moert::cuda
