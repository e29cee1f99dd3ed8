#include "cuda/grouped_gemm.cuh"

#include <algorithm>
#include <type_traits>
#include <utility>

#include "cuda/grouped_gemm_mma.h"
#include "cuda/grouped_gemm_persistent.h"
#include "cuda/grouped_gemm_sm90.h"
#include "cuda/launch.h"

namespace moert::cuda {

namespace {

#if defined(MOERT_CUTLASS)
constexpr bool kTensorCores = true;
#else
constexpr bool kTensorCores = false;  // an emulation without CUTLASS has none
#endif

template <typename T>
constexpr bool takes(bool tf32) {
  return sizeof(T) == 2 || tf32;
}

// The same product with its output's columns side by side, if one way round they are.
template <typename T>
Gradient<T> by_rows(const Gradient<T>& p) {
  if (p.dw.column == 1 || p.dw.row != 1) return p;
  Gradient<T> q = p;
  std::swap(q.N, q.K);
  std::swap(q.dy, q.x);
  std::swap(q.dw.row, q.dw.column);
  return q;
}

}  // namespace

template <typename T, class To>
void multiply(const Product<T, To>& p, bool tf32, void* stream) {
  if (p.S == 0 || p.N == 0) return;
  if constexpr (kTensorCores && !std::is_same_v<T, double>) {
    if (takes<T>(tf32) && fits_tensor_cores(p)) {
      if constexpr (sizeof(T) == 2)  // Hopper's kernels
        if (takes_persistent(p)) return grouped_gemm_persistent(p, stream);
#if defined(__CUDACC__)
      if constexpr (sizeof(T) == 2 && std::is_same_v<To, Epilogue<T>>)
        if (p.workspace && takes_pointer_arrays(p)) return grouped_gemm_by_pointer_arrays(p, p.workspace, stream);
#endif
      return grouped_gemm_on_tensor_cores(p, stream);
    }
  }
  const int64_t tiles = num_row_tiles(p.S, p.E, kSimtTile) * ceil_div(p.N, kSimtTile);
  launch(&grouped_gemm_simt<T, To>, {tiles}, kSimtThreads, stream, p);
}

template <typename T>
void multiply(const Gradient<T>& gradient, bool tf32, void* stream) {
  const Gradient<T> p = by_rows(gradient);
  if (p.N == 0 || p.K == 0) return;
  if constexpr (kTensorCores && !std::is_same_v<T, double>) {
    if (takes<T>(tf32) && fits_tensor_cores(p)) return wgrad_on_tensor_cores(p, stream);
  }
  const int64_t tiles = p.E * ceil_div(p.N, kSimtTile) * ceil_div(p.K, kSimtTile);
  launch(&grouped_gemm_wgrad_simt<T>, {tiles}, kSimtThreads, stream, p);
}

#define MOERT_INSTANTIATE(T)                                                     \
  template void multiply(const Product<T>&, bool, void*);                        \
  template void multiply(const Product<T, ActivationBackward<T>>&, bool, void*); \
  template void multiply(const Gradient<T>&, bool, void*);
MOERT_INSTANTIATE(float)
MOERT_INSTANTIATE(bf16)
MOERT_INSTANTIATE(f16)
MOERT_INSTANTIATE(double)
#undef MOERT_INSTANTIATE

int64_t grouped_gemm_workspace([[maybe_unused]] int64_t E) {
  int64_t bytes = 0;
  if constexpr (kTensorCores) bytes = persistent_workspace();
#if defined(__CUDACC__)
  bytes = std::max(bytes, pointer_array_workspace(E));
#endif
  return bytes;
}

void grouped_gemm(const GroupedGemm& p, void* stream, void* y, int64_t y_stride) {
  with_dtype(p.x.dtype, [&](auto type) {
    using T = decltype(type);
    multiply(product_of<T>(p, y, y_stride), p.tf32, stream);
  });
}

void grouped_gemm_wgrad(const GroupedGemmWgrad& p, void* stream, const ExpertMatrix& dw) {
  with_dtype(p.x.dtype, [&](auto type) { multiply(gradient_of<decltype(type)>(p, dw), p.tf32, stream); });
}

}  // namespace moert::cuda
