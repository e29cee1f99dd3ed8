#include "cuda/fused_experts.cuh"

#include <algorithm>

#include "cuda/few_tokens.h"
#include "cuda/fused_experts.h"
#include "cuda/launch.h"

namespace moert::cuda {

template <typename T>
void SlotPlan<T>::run(const RoutedRows& r, int64_t E, void* stream) const {
  permute_plan(r.ids, r.T, r.k, E, -1, workspace, stream, offsets, tokens, slots);
  if (!scale) return;
  const int64_t choices = r.T * r.k;
  launch(&scale_by_slot<Acc<T>>, {ceil_div(choices, kRowThreads)}, kRowThreads, stream,
         static_cast<const Acc<T>*>(r.weights), slots, choices, scale);
}

template struct SlotPlan<float>;
template struct SlotPlan<bf16>;
template struct SlotPlan<f16>;
template struct SlotPlan<double>;

namespace {

template <typename T>
struct Forward {
  const RoutedRows& tokens;
  const ExpertWeights& w;
  Memory memory;
  SlotPlan<T> plan;
  T *act, *rows;  // [T*k, I], [T*k, H]
  void* groups;   // of each product

  Forward(const RoutedRows& tokens, const ExpertWeights& w, void* workspace)
      : tokens(tokens),
        w(w),
        memory(workspace),
        plan(tokens, w.E, w.scale_on == ScaleOn::input, memory),
        act(memory.take<T>(tokens.T * tokens.k * w.I)),
        rows(memory.take<T>(tokens.T * tokens.k * w.H)),
        groups(memory.take<char>(grouped_gemm_workspace(w.E))) {}

  void run(void* stream, T* y, T* h) const {
    plan.run(tokens, w.E, stream);
    Product<T> first = first_product(tokens, w, plan, act, h);
    first.workspace = groups;
    multiply(first, tokens.tf32, stream);
    const int64_t S = tokens.T * tokens.k;
    GroupedGemm second{};
    second.S = S, second.E = w.E, second.N = w.H, second.K = w.I, second.offsets = plan.offsets;
    second.x = {act, DTypeOf<T>::value, w.I};
    second.w = w.down;
    second.bias = w.down_bias;
    second.batch_invariant = tokens.batch_invariant;
    second.workspace = groups;
    multiply(product_of<T>(second, rows, w.H), tokens.tf32, stream);
    unpermute_rows(rows, w.H, DTypeOf<T>::value, plan.slots, w.scale_on == ScaleOn::output ? tokens.weights : nullptr,
                   nullptr, 0, tokens.T, tokens.k, S, w.H, stream, y);
  }
};

// Whether the tokens are so few that sorting them does not pay.  A row's bits depend on how many there are, then.
bool are_few(const RoutedRows& tokens, const void* h) {
  return tokens.T <= kFewTokens && !h && !tokens.batch_invariant;
}

}  // namespace

int64_t fused_experts_workspace(const RoutedRows& tokens, const ExpertWeights& experts) {
  int64_t bytes = 0;
  with_dtype(tokens.x.dtype,
             [&](auto type) { bytes = Forward<decltype(type)>(tokens, experts, nullptr).memory.used(); });
  return std::max(bytes, few_tokens_workspace(tokens.x.dtype, tokens.T * tokens.k, experts.I));
}

void fused_experts(const RoutedRows& tokens, const ExpertWeights& experts, void* workspace, void* stream, void* y,
                   void* h) {
  check_alone(tokens);
  if (tokens.T == 0) return;
  if (are_few(tokens, h)) return fused_experts_few(tokens, experts, workspace, stream, y);
  with_dtype(tokens.x.dtype, [&](auto type) {
    using T = decltype(type);
    Forward<T>(tokens, experts, workspace).run(stream, static_cast<T*>(y), static_cast<T*>(h));
  });
}

}  // namespace moert::cuda
