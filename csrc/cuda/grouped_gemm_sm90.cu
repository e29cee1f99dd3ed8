// Every kernel for sm_90a that there is: 128 x 256 x 64 cooperative, two blocks a cluster, w K-major or MN-major.
#include "cuda/grouped_gemm_sm90.h"

#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/group_array_problem_shape.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "cuda/expert_tiles.h"
#include "cuda/gpu.h"
#include "cuda/launch.h"
#include "cuda/memory.h"

namespace moert::cuda {

namespace {

using cute::Int;

template <typename T>
using ElementOf = std::conditional_t<std::is_same_v<T, bf16>, cutlass::bfloat16_t, cutlass::half_t>;

// One product per expert, [slots, N] = [slots, K] . [N, K]^T.
template <typename T, bool kMajorK>
struct Grouped {
  using Element = ElementOf<T>;
  using Row = cutlass::layout::RowMajor;
  using LayoutB = std::conditional_t<kMajorK, cutlass::layout::ColumnMajor, Row>;
  using TileShape = cute::Shape<Int<128>, Int<256>, Int<64>>;
  using Cluster = cute::Shape<Int<2>, Int<1>, Int<1>>;
  using Problem = cutlass::gemm::GroupProblemShape<cute::Shape<int, int, int>>;
  static constexpr int kAlign = 8;  // elements: 16 bytes

  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, TileShape, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, Row*, kAlign, Element, Row*, kAlign,
      cutlass::epilogue::PtrArrayTmaWarpSpecializedCooperative,
      cutlass::epilogue::fusion::LinearCombination<Element, float, void, float>>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, Row*, kAlign, Element, LayoutB*, kAlign, float,
      TileShape, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<int(sizeof(typename Epilogue::SharedStorage))>,
      cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperative>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<Problem, Mainloop, Epilogue>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  // What the kernel reads of each expert, filled on the device.
  struct Groups {
    typename Problem::UnderlyingProblemShape* sizes;
    const Element **a, **b;
    Element** d;
    typename Kernel::InternalStrideA* a_stride;
    typename Kernel::InternalStrideB* b_stride;
    typename Kernel::InternalStrideD* d_stride;

    Groups(int64_t E, Memory& memory)
        : sizes(memory.take<typename Problem::UnderlyingProblemShape>(E)),
          a(memory.take<const Element*>(E)),
          b(memory.take<const Element*>(E)),
          d(memory.take<Element*>(E)),
          a_stride(memory.take<typename Kernel::InternalStrideA>(E)),
          b_stride(memory.take<typename Kernel::InternalStrideB>(E)),
          d_stride(memory.take<typename Kernel::InternalStrideD>(E)) {}
  };

  static typename Gemm::Arguments arguments(int64_t E, const Groups& groups) {
    typename Gemm::Arguments arguments{};
    arguments.mode = cutlass::gemm::GemmUniversalMode::kGrouped;
    arguments.problem_shape = {int(E), groups.sizes, nullptr};
    arguments.mainloop = {groups.a, groups.a_stride, groups.b, groups.b_stride};
    arguments.epilogue.thread.alpha = 1;
    arguments.epilogue.thread.beta = 0;
    arguments.epilogue.ptr_D = groups.d;
    arguments.epilogue.dD = groups.d_stride;
    arguments.hw_info.sm_count = num_sms();
    return arguments;
  }

  static int64_t workspace(int64_t E) {
    Memory memory(nullptr);
    const Groups groups(E, memory);
    return memory.used() + int64_t(Gemm::get_workspace_size(arguments(E, groups)));
  }
};

constexpr int kFillThreads = 128;

template <typename G, typename T>
__global__ void fill_groups(Product<T> p, typename G::Groups groups) {
  using Element = typename G::Element;
  const int e = int(blockIdx.x) * kFillThreads + int(threadIdx.x);
  if (e >= p.E) return;
  const Slots slots = slots_of(p.offsets, e, p.S);
  groups.sizes[e] = {slots.count, int(p.N), int(p.K)};
  groups.a[e] = reinterpret_cast<const Element*>(p.x.data + slots.begin * p.x.stride);
  groups.b[e] = reinterpret_cast<const Element*>(p.w.at(e, 0, 0));
  groups.d[e] = reinterpret_cast<Element*>(p.epilogue.y + slots.begin * p.epilogue.y_stride);
  cute::get<0>(groups.a_stride[e]) = p.x.stride;
  cute::get<0>(groups.d_stride[e]) = p.epilogue.y_stride;
  if constexpr (cute::is_static_v<std::decay_t<decltype(cute::get<1>(groups.b_stride[e]))>>)
    cute::get<0>(groups.b_stride[e]) = p.w.row;
  else
    cute::get<1>(groups.b_stride[e]) = p.w.column;
}

constexpr int kClearThreads = 256, kClearBlocks = 264;

// The slots that no expert has.
template <typename T>
__global__ void clear_unused(Product<T> p) {
  const int64_t first = p.offsets[p.E] < 0 ? 0 : p.offsets[p.E];
  for (int64_t row = first + blockIdx.x; row < p.S; row += kClearBlocks)
    for (int64_t column = threadIdx.x; column < p.N; column += kClearThreads) p.epilogue.clear(row, column);
}

template <bool kMajorK, typename T>
void run(const Product<T>& p, void* workspace, void* stream) {
  using G = Grouped<T, kMajorK>;
  Memory memory(workspace);
  const typename G::Groups groups(p.E, memory);
  launch(&fill_groups<G, T>, {ceil_div(p.E, kFillThreads)}, kFillThreads, stream, p, groups);
  launch(&clear_unused<T>, {kClearBlocks}, kClearThreads, stream, p);
  typename G::Gemm gemm;
  const auto arguments = G::arguments(p.E, groups);
  const auto start = [&](cutlass::Status status) {
    MOERT_CHECK(status == cutlass::Status::kSuccess,
                "a grouped product did not start: ", cutlassGetStatusString(status));
  };
  start(gemm.initialize(arguments, memory.take<char>(0), static_cast<cudaStream_t>(stream)));
  start(gemm.run(static_cast<cudaStream_t>(stream)));
}

}  // namespace

template <typename T>
bool takes_pointer_arrays(const Product<T>& p) {
  const Epilogue<T>& to = p.epilogue;
  const bool plain = !p.x.index && !to.bias && !to.scale && !to.activates && !to.h && !to.sums;
  // TMA is for rows that lie apart.  A problem of no depth has no tile in it, and so no zeros.
  const bool apart = p.x.stride >= p.K && (p.w.column == 1 ? p.w.row >= p.K : p.w.column >= p.N);
  return plain && apart && p.K > 0 && p.N <= 0x7fffffff && is_sm90();
}

int64_t pointer_array_workspace(int64_t E) {
  if (!is_sm90()) return 0;
  return std::max(Grouped<bf16, true>::workspace(E), Grouped<bf16, false>::workspace(E));
}

template <typename T>
void grouped_gemm_by_pointer_arrays(const Product<T>& p, void* workspace, void* stream) {
  p.w.column == 1 ? run<true>(p, workspace, stream) : run<false>(p, workspace, stream);
}

template bool takes_pointer_arrays(const Product<bf16>&);
template bool takes_pointer_arrays(const Product<f16>&);
template void grouped_gemm_by_pointer_arrays(const Product<bf16>&, void*, void*);
template void grouped_gemm_by_pointer_arrays(const Product<f16>&, void*, void*);

}  // namespace moert::cuda
