#include "cuda/gating.cuh"

#include "cuda/launch.h"

namespace moert::cuda {

namespace {

template <typename Real, bool Forward>
void run_in(const GatingCall& call, void* stream) {
  const auto kernel = [&] {
    const int64_t items = ceil_div(call.E, kWarp);
    // float64 is for checking gradients.
    if constexpr (sizeof(Real) == 8)
      return items <= 8 ? &gating_kernel<Real, 8, Forward> : &gating_kernel<Real, 32, Forward>;
    if (items <= 2) return &gating_kernel<Real, 2, Forward>;
    if (items <= 4) return &gating_kernel<Real, 4, Forward>;
    if (items <= 8) return &gating_kernel<Real, 8, Forward>;
    if (items <= 16) return &gating_kernel<Real, 16, Forward>;
    return &gating_kernel<Real, 32, Forward>;
  }();
  launch(kernel, {ceil_div(call.T, kGatingThreads / kWarp)}, kGatingThreads, stream, call);
}

template <bool Forward>
void run(GatingCall call, void* stream) {
  MOERT_CHECK(call.options.num_groups <= kMostGroups, "num_groups must be at most ", kMostGroups, " on a GPU, got ",
              call.options.num_groups);
  call.aligned = is_aligned(call.logits, call.stride * size_of(call.dtype));
  (call.dtype == DType::f64 ? run_in<double, Forward> : run_in<float, Forward>)(call, stream);
}

// Before they are made 32 bits wide.
void check_sizes(int64_t E, int64_t k) {
  MOERT_CHECK(E <= kMostExperts, "logits must have at most ", kMostExperts, " experts on a GPU, got E=", E);
  MOERT_CHECK(k <= kMostChoices, "k must be at most ", kMostChoices, " on a GPU, got ", k);
}

}  // namespace

void topk_gating(const void* logits, DType dtype, int64_t stride, const void* bias, int64_t T, int64_t E, int64_t k,
                 const GatingOptions& options, void* stream, void* weights, int32_t* ids) {
  if (T == 0 || k == 0) return;
  check_sizes(E, k);
  run<true>({logits, dtype, stride, bias, T, int(E), int(k), options, false, weights, ids, nullptr}, stream);
}

void topk_gating_backward(const void* dweights, const void* logits, DType dtype, int64_t stride, const int32_t* ids,
                          int64_t T, int64_t E, int64_t k, const GatingOptions& options, void* stream, void* dlogits) {
  if (T == 0 || E == 0) return;
  check_sizes(E, k);
  run<false>({logits, dtype, stride, nullptr, T, int(E), int(k), options, false, const_cast<void*>(dweights),
              const_cast<int32_t*>(ids), dlogits},
             stream);
}

}  // namespace moert::cuda
