#include "cuda/fused_experts.cuh"

#include "cuda/combine.h"
#include "cuda/few_tokens.h"
#include "cuda/fused_experts.h"
#include "cuda/launch.h"

namespace moert::cuda {

template <typename T>
void SlotPlan<T>::run(const RoutedRows& r, int64_t E, void* stream) const {
  if (!r.offsets)
    permute_plan(r.ids, r.T, r.k, E, -1, workspace, stream, const_cast<int32_t*>(offsets), const_cast<int32_t*>(tokens),
                 const_cast<int32_t*>(slots));
  if (!scale) return;
  const int64_t choices = r.T * r.k;
  launch(&scale_by_slot<Acc<T>>, {ceil_div(choices, kRowThreads)}, kRowThreads, stream,
         static_cast<const Acc<T>*>(r.weights), slots, choices, S, scale);
}

template struct SlotPlan<float>;
template struct SlotPlan<bf16>;
template struct SlotPlan<f16>;
template struct SlotPlan<double>;

namespace {

// Whether the second product adds up the choices (RoutedRows::fused_combine).
bool adds_up(const RoutedRows& tokens, bool saves) { return tokens.fused_combine && !saves && !tokens.batch_invariant; }

template <typename T>
struct Forward {
  using A = Acc<T>;
  static constexpr bool kRounds = !std::is_same_v<T, A>;  // the sums of tokens, which else are y

  const RoutedRows& tokens;
  const ExpertWeights& w;
  bool adds, scale_output;
  Memory memory;
  SlotPlan<T> plan;
  T *act, *rows;  // [S, I], [S, H]
  A* sums;        // [T, H]
  void* groups;   // of each product

  Forward(const RoutedRows& tokens, const ExpertWeights& w, bool saves, void* workspace)
      : tokens(tokens),
        w(w),
        adds(adds_up(tokens, saves)),
        scale_output(w.scale_on == ScaleOn::output),
        memory(workspace),
        plan(tokens, w.E, adds || !scale_output, memory),
        act(memory.take<T>(plan.S * w.I)),
        rows(adds ? nullptr : memory.take<T>(plan.S * w.H)),
        sums(adds && kRounds ? memory.take<A>(tokens.T * w.H) : nullptr),
        groups(memory.take<char>(grouped_gemm_workspace(w.E))) {}

  void run(void* stream, T* y, T* h) const {
    plan.run(tokens, w.E, stream);
    Product<T> first = first_product(tokens, w, plan, act, h);
    first.workspace = groups;
    multiply(first, tokens.tf32, stream);
    GroupedGemm product{};
    product.S = plan.S, product.E = w.E, product.N = w.H, product.K = w.I, product.offsets = plan.offsets;
    product.x = {act, DTypeOf<T>::value, w.I};
    product.w = w.down;
    product.bias = w.down_bias;
    product.batch_invariant = tokens.batch_invariant;
    product.workspace = groups;
    Product<T> second = product_of<T>(product, rows, w.H);
    if (adds) return add_up(second, stream, y);
    multiply(second, tokens.tf32, stream);
    combine_rows({rows, w.H, DTypeOf<T>::value, plan.S, w.H}, plan.slots, scale_output ? tokens.weights : nullptr,
                 tokens.onto, tokens.T, tokens.k, stream, y);
  }

  void add_up(Product<T>& second, void* stream, T* y) const {
    A* to = sums;
    if constexpr (!kRounds) to = y;
    second.epilogue.sums = to, second.epilogue.tokens = plan.tokens, second.epilogue.num_tokens = tokens.T;
    second.epilogue.scale = scale_output ? plan.scale : nullptr;
    const int64_t count = tokens.T * w.H;
    const bool eights = w.H % 8 == 0;
    const Grid grid{ceil_div(count, kRowThreads * (eights ? 8 : 1))};
    launch(eights ? &start_sums<T, 8> : &start_sums<T, 1>, grid, kRowThreads, stream, OntoOf<T>(tokens.onto), count,
           w.H, to);
    multiply(second, tokens.tf32, stream);
    if constexpr (kRounds)
      launch(eights ? &round_sums<T, 8> : &round_sums<T, 1>, grid, kRowThreads, stream, sums, count, y);
  }
};

// Whether the tokens are so few that sorting them does not pay.  A row's bits depend on how many there are, then.
bool are_few(const RoutedRows& tokens, bool saves) {
  return tokens.T <= kFewTokens && !saves && !tokens.batch_invariant;
}

}  // namespace

int64_t fused_experts_workspace(const RoutedRows& tokens, const ExpertWeights& experts, bool saves) {
  if (are_few(tokens, saves)) return few_tokens_workspace(tokens.x.dtype, tokens.T * tokens.k, experts.I);
  int64_t bytes = 0;
  with_dtype(tokens.x.dtype,
             [&](auto type) { bytes = Forward<decltype(type)>(tokens, experts, saves, nullptr).memory.used(); });
  return bytes;
}

void fused_experts(const RoutedRows& tokens, const ExpertWeights& experts, void* workspace, void* stream, void* y,
                   void* h) {
  if (tokens.T == 0 && !h) return;  // slots of a plan have h all the same
  if (are_few(tokens, h)) return fused_experts_few(tokens, experts, workspace, stream, y);
  with_dtype(tokens.x.dtype, [&](auto type) {
    using T = decltype(type);
    Forward<T>(tokens, experts, h, workspace).run(stream, static_cast<T*>(y), static_cast<T*>(h));
  });
}

}  // namespace moert::cuda
