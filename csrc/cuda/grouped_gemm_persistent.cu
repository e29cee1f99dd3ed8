// Every persistent kernel that there is: for each 16-bit element and either way that weights lie, gated or not, wide
// and narrow tiles of rows that are gathered or not, and four for few rows, gathered; and for dy . down, of which rows
// are gathered, wide and narrow ones.
#include "cuda/grouped_gemm_persistent.cuh"

#include <algorithm>

#include "cuda/gpu.h"
#include "cuda/grouped_gemm_persistent.h"
#include "cuda/launch.h"

namespace moert::cuda {

namespace {

bool is_asked_for() { return is_on("MOERT_PERSISTENT_GEMM"); }

constexpr int64_t kMostStride = int64_t(1) << 40;  // bytes that the copy engine steps over, less one

bool steps(int64_t stride) { return stride > 0 && 2 * stride < kMostStride; }

template <typename T, class To>
int64_t up_from_gate(const Product<T, To>& p) {
  return (reinterpret_cast<intptr_t>(p.up.data) - reinterpret_cast<intptr_t>(p.w.data)) / int64_t(sizeof(T));
}

// The gate and the up half of w1 are dimensions of their own.
template <class Tiling, class Q>
TensorMap weights(const Q& q) {
  const auto& p = q.p;
  const auto K = uint64_t(p.K), N = uint64_t(p.N), E = uint64_t(p.E);
  const uint64_t line = 2 * (Tiling::kMajor ? p.w.row : p.w.column), expert = E > 1 ? 2 * p.w.expert : line;
  const auto up = [&] { return uint64_t(2 * up_from_gate(p)); };
  if constexpr (Tiling::kMajor) {
    if (q.gating() == Gating::eights)
      return tensor_map(
          {p.w.data, 5, {K, 8, 2, N / 8, E}, {line, up(), 8 * line, expert}, {kSliceK, 8, 2, Tiling::kBox / 16, 1}});
    return tensor_map({p.w.data, 3, {K, N, E}, {line, expert}, {kSliceK, Tiling::kBox, 1}});
  } else {
    if (q.gating() == Gating::halves)
      return tensor_map({p.w.data, 4, {N, K, 2, E}, {line, up(), expert}, {Tiling::kBox, kSliceK, 1, 1}});
    const uint64_t across = q.gating() == Gating::alternate ? 2 * N : N;
    return tensor_map({p.w.data, 3, {across, K, E}, {line, expert}, {Tiling::kBox, kSliceK, 1}});
  }
}

template <class Kernel, class Q>
void launch_clusters(Kernel kernel, unsigned blocks, int bytes, [[maybe_unused]] void* stream, const Q& q) {
#if defined(__CUDACC__)
  MOERT_CUDA_CHECK(
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {unsigned(q.tile.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = blocks, config.blockDim = kPersistentThreads, config.dynamicSmemBytes = size_t(bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster, config.numAttrs = 1;
  MOERT_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, q));
#else
  emulate::run(
      {blocks, 1, 1}, kPersistentThreads, size_t(bytes), [&] { kernel(q); }, emulate::kMostSharedOfHopper,
      unsigned(q.tile.cluster));
#endif
}

template <class Tiling, typename T, class To>
void start(const Product<T, To>& p, const PersistentTile& tile, void* stream) {
  using Q = PersistentProduct<T, To>;
  Q q{{}, {}, p, tile, nullptr};
  q.w = weights<Tiling>(q);
  if constexpr (!Tiling::kGathered)
    q.x = tensor_map({p.x.data, 2, {uint64_t(p.K), uint64_t(p.S)}, {uint64_t(2 * p.x.stride)}, {kSliceK, kXBox}});
  if (tile.splits > 1) q.sums = static_cast<float*>(p.workspace);
  const int64_t tiles = q.num_tiles_at_most(), clusters = num_sms() / tile.cluster;
  const auto blocks = unsigned(tile.cluster * std::min<int64_t>(std::max<int64_t>(tiles * tile.splits, 1), clusters));
  launch_clusters(&grouped_gemm_persistent_kernel<Tiling, Q>, blocks, kPersistentBytes<Tiling>, stream, q);
  if constexpr (!To::kSumsRows)
    if (q.sums) launch(&add_split_sums<T>, {tiles}, kAddThreads, stream, q);
}

template <int kX, int kW, bool kGathered, typename T, class To>
void start_either_way(const Product<T, To>& p, const PersistentTile& tile, void* stream) {
  using Element = std::conditional_t<std::is_same_v<T, bf16>, cute::bfloat16_t, cute::half_t>;
  p.w.column == 1 ? start<Tiling<Element, kX, kW, kGathered, true>>(p, tile, stream)
                  : start<Tiling<Element, kX, kW, kGathered, false>>(p, tile, stream);
}

template <int kW, typename T, class To>
void start_many_rows(const Product<T, To>& p, const PersistentTile& tile, void* stream) {
  if constexpr (!To::kSumsRows)
    if (!p.x.index) return start_either_way<kWideX, kW, false>(p, tile, stream);
  start_either_way<kWideX, kW, true>(p, tile, stream);
}

}  // namespace

template <typename T, class To>
bool takes_persistent(const Product<T, To>& p) {
  if (!is_asked_for() || !is_sm90()) return false;
  if (p.S == 0 || p.E == 0 || p.K == 0 || p.N > 0x3fffffff) return false;
  // Rows, or columns, that lie apart, and steps of the copy engine forwards.
  const bool gated = p.epilogue.takes_up(), by_rows = p.w.column == 1, alternate = gated && !by_rows && p.w.row == 2;
  const int64_t line = by_rows ? p.w.row : p.w.column, width = by_rows ? p.K : alternate ? 2 * p.N : p.N;
  if (!by_rows && !alternate && p.w.row != 1) return false;
  if (line < width || !steps(8 * line) || (p.E > 1 && !steps(p.w.expert))) return false;
  // Gates and ups are one tensor, of which an expert is one step.
  if (gated) return p.x.index && steps(up_from_gate(p)) && (p.E == 1 || p.up.expert == p.w.expert);
  return p.x.index || (!To::kSumsRows && p.x.stride >= p.K && steps(p.x.stride));
}

int64_t persistent_workspace() {
  // As many narrow tiles as there are multiprocessors: more are not split.
  return is_asked_for() && is_sm90() ? num_sms() * kWideX * kNarrowW * int64_t(sizeof(float)) : 0;
}

template <typename T, class To>
PersistentTile tile_of(const Product<T, To>& p) {
  // Sums along a row are a warp's, which has 64 columns of wide tiles alone.
  return persistent_tile({p.S, p.E, p.N, p.K, p.epilogue.takes_up(), p.x.index != nullptr,
                          p.batch_invariant || To::kSumsRows, p.workspace != nullptr, num_sms()});
}

template <typename T>
void start_few_rows(const Product<T>& p, const PersistentTile& tile, void* stream) {
  switch (tile.x) {
    case 8:
      return start_either_way<8, kNarrowW, true>(p, tile, stream);
    case 16:
      return start_either_way<16, kNarrowW, true>(p, tile, stream);
    case 32:
      return start_either_way<32, kNarrowW, true>(p, tile, stream);
    case 64:
      return start_either_way<64, kNarrowW, true>(p, tile, stream);
  }
}

template <typename T, class To>
void grouped_gemm_persistent(const Product<T, To>& p, void* stream) {
  const PersistentTile tile = tile_of(p);
  if constexpr (!To::kSumsRows)
    if (tile.x < kWideX) return start_few_rows(p, tile, stream);
  tile.w == kWideW ? start_many_rows<kWideW>(p, tile, stream) : start_many_rows<kNarrowW>(p, tile, stream);
}

#define MOERT_INSTANTIATE(...)                         \
  template bool takes_persistent(const __VA_ARGS__&);  \
  template PersistentTile tile_of(const __VA_ARGS__&); \
  template void grouped_gemm_persistent(const __VA_ARGS__&, void*);
MOERT_INSTANTIATE(Product<bf16>)
MOERT_INSTANTIATE(Product<f16>)
MOERT_INSTANTIATE(Product<bf16, ActivationBackward<bf16>>)
MOERT_INSTANTIATE(Product<f16, ActivationBackward<f16>>)
#undef MOERT_INSTANTIATE

}  // namespace moert::cuda
