// Every kernel over tensor cores that there is: 8 for each element.
#include "cuda/grouped_gemm_mma.cuh"

#include "cuda/grouped_gemm_mma.h"
#include "cuda/launch.h"

namespace moert::cuda {

namespace {

template <typename T>
struct ElementOf;
template <>
struct ElementOf<bf16> {
  using Type = cute::bfloat16_t;
};
template <>
struct ElementOf<f16> {
  using Type = cute::half_t;
};
template <>
struct ElementOf<float> {
  using Type = cute::tfloat32_t;
};

template <typename P>
void start(void (*kernel)(P), int64_t blocks, int threads, int shared, [[maybe_unused]] void* stream, const P& p) {
  if (blocks == 0) return;
  MOERT_CHECK(blocks <= 0x7fffffff, "a grouped product must have at most 2^31 - 1 tiles, got ", blocks);
#if defined(__CUDACC__)
  MOERT_CUDA_CHECK(
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  kernel<<<unsigned(blocks), threads, shared, static_cast<cudaStream_t>(stream)>>>(p);
  MOERT_CUDA_CHECK(cudaGetLastError());
#else
  emulate::run({unsigned(blocks), 1, 1}, unsigned(threads), size_t(shared), [&] { kernel(p); });
#endif
}

template <Major kMajorW, Gates kGates, typename T, class To>
void start_product(const Product<T, To>& p, void* stream) {
  using Element = typename ElementOf<T>::Type;
  constexpr int kColumns = kGates == Gates::none ? kMmaTile : kMmaTile / 2;
  const int64_t blocks = num_row_tiles(p.S, p.E, kMmaTile) * ceil_div(p.N, kColumns);
  start(&grouped_gemm_mma<Element, kMajorW, kGates, T, To>, blocks, Tile<Element>::kThreads, kSharedBytes<Element>,
        stream, p);
}

}  // namespace

template <typename T, class To>
void grouped_gemm_on_tensor_cores(const Product<T, To>& p, void* stream) {
  const bool k_major = p.w.column == 1;
  if constexpr (std::is_same_v<To, Epilogue<T>>) {
    if (p.epilogue.takes_up()) {
      if (k_major) return start_product<Major::k, Gates::apart>(p, stream);
      if (p.w.row == 1) return start_product<Major::mn, Gates::apart>(p, stream);
      return start_product<Major::mn, Gates::alternate>(p, stream);
    }
  }
  if (k_major) return start_product<Major::k, Gates::none>(p, stream);
  return start_product<Major::mn, Gates::none>(p, stream);
}

template <typename T>
void wgrad_on_tensor_cores(const Gradient<T>& p, void* stream) {
  using Element = typename ElementOf<T>::Type;
  const int64_t blocks = p.E * ceil_div(p.N, kMmaTile) * ceil_div(p.K, kMmaTile);
  start(&grouped_gemm_wgrad_mma<Element, T>, blocks, Tile<Element>::kThreads, kSharedBytes<Element>, stream, p);
}

#define MOERT_INSTANTIATE(T)                                                                   \
  template void grouped_gemm_on_tensor_cores(const Product<T>&, void*);                        \
  template void grouped_gemm_on_tensor_cores(const Product<T, ActivationBackward<T>>&, void*); \
  template void wgrad_on_tensor_cores(const Gradient<T>&, void*);
MOERT_INSTANTIATE(bf16)
MOERT_INSTANTIATE(f16)
MOERT_INSTANTIATE(float)
#undef MOERT_INSTANTIATE

}  // namespace moert::cuda
