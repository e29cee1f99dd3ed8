// Every persistent kernel that there is: for each 16-bit element three, with wide and with narrow tiles.
#include "cuda/grouped_gemm_persistent.cuh"

#include <algorithm>
#include <cstdlib>
#include <string>

#include "cuda/gpu.h"
#include "cuda/grouped_gemm_persistent.h"
#include "cuda/launch.h"

namespace moert::cuda {

namespace {

bool is_asked_for() {
  const char* value = std::getenv("MOERT_PERSISTENT_GEMM");
  const std::string wanted = value ? value : "";
  MOERT_CHECK(wanted.empty() || wanted == "0" || wanted == "1", "MOERT_PERSISTENT_GEMM must be 0 or 1, got ", wanted);
  return wanted == "1";
}

constexpr int64_t kMostStride = int64_t(1) << 40;  // bytes that the copy engine steps over, less one

bool steps(int64_t stride) { return stride > 0 && 2 * stride < kMostStride; }

template <typename T>
int64_t up_from_gate(const Product<T>& p) {
  return (reinterpret_cast<intptr_t>(p.up.data) - reinterpret_cast<intptr_t>(p.w.data)) / int64_t(sizeof(T));
}

// With gates, a box has eight rows of the gate, the same eight of up, and so on, as dimensions of their own.
template <class Tiling, typename T>
TensorMap weights(const Product<T>& p) {
  const auto K = uint64_t(p.K), N = uint64_t(p.N), E = uint64_t(p.E);
  const uint64_t row = 2 * p.w.row, expert = 2 * (E > 1 ? p.w.expert : p.w.row), up = 2 * up_from_gate(p);
  if constexpr (Tiling::kGated)
    return tensor_map(
        {p.w.data, 5, {K, 8, 2, N / 8, E}, {row, up, 8 * row, expert}, {kSliceK, 8, 2, Tiling::kW / 16, 1}});
  else
    return tensor_map({p.w.data, 3, {K, N, E}, {row, expert}, {kSliceK, Tiling::kW, 1}});
}

template <class Tiling, typename T>
void start(const Product<T>& p, [[maybe_unused]] void* stream) {
  constexpr auto kernel = &grouped_gemm_persistent_kernel<Tiling, T>;
  constexpr int kBytes = kPersistentBytes<Tiling>;
  PersistentProduct<T> q{weights<Tiling>(p), {}, p};
  if constexpr (!Tiling::kGathered)
    q.x = tensor_map({p.x.data, 2, {uint64_t(p.K), uint64_t(p.S)}, {uint64_t(2 * p.x.stride)}, {kSliceK, kXBox}});
  const auto blocks = unsigned(std::min<int64_t>(num_tiles_at_most<Tiling>(p), num_sms()));
#if defined(__CUDACC__)
  MOERT_CUDA_CHECK(
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  kernel<<<blocks, kPersistentThreads, kBytes, static_cast<cudaStream_t>(stream)>>>(q);
  MOERT_CUDA_CHECK(cudaGetLastError());
#else
  emulate::run({blocks, 1, 1}, kPersistentThreads, kBytes, [&] { kernel(q); }, emulate::kMostSharedOfHopper);
#endif
}

template <bool kGathered, bool kGated, typename T>
void start_wide_or_narrow(const Product<T>& p, void* stream) {
  using Element = std::conditional_t<std::is_same_v<T, bf16>, cute::bfloat16_t, cute::half_t>;
  using Wide = Tiling<Element, 256, kGathered, kGated>;
  using Narrow = Tiling<Element, 128, kGathered, kGated>;
  // Wide tiles read less for a product; but every multiprocessor should have one.
  const bool wide = p.S / Wide::kX * ceil_div(p.N, Wide::kColumns) >= num_sms();
  wide ? start<Wide>(p, stream) : start<Narrow>(p, stream);
}

}  // namespace

template <typename T>
bool takes_persistent(const Product<T>& p) {
  if (!is_asked_for() || !is_sm90()) return false;
  if (p.S == 0 || p.E == 0 || p.K == 0 || p.N > 0x7fffffff || p.w.column != 1) return false;
  // Rows that lie apart, and steps of the copy engine forwards.
  if (p.w.row < p.K || !steps(8 * p.w.row) || (p.E > 1 && !steps(p.w.expert))) return false;
  // Gates and ups are one tensor, of which an expert is one step.
  if (p.epilogue.form.gated) return p.x.index && steps(up_from_gate(p)) && (p.E == 1 || p.up.expert == p.w.expert);
  return p.x.index || (p.x.stride >= p.K && steps(p.x.stride));
}

template <typename T>
void grouped_gemm_persistent(const Product<T>& p, void* stream) {
  if (p.epilogue.form.gated)
    start_wide_or_narrow<true, true>(p, stream);
  else if (p.x.index)
    start_wide_or_narrow<true, false>(p, stream);
  else
    start_wide_or_narrow<false, false>(p, stream);
}

template bool takes_persistent(const Product<bf16>&);
template bool takes_persistent(const Product<f16>&);
template void grouped_gemm_persistent(const Product<bf16>&, void*);
template void grouped_gemm_persistent(const Product<f16>&, void*);

}  // namespace moert::cuda
