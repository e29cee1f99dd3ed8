// What the kernels for sm_90a alone are written in: barriers that count bytes, boxes that the copy engine brings and
// products of four warps.  Instructions under nvcc, in the host emulation functions of the same name
// (emulate_hopper.h).
#pragma once

#include "cuda/tensor_core.h"

#if defined(__CUDACC__)
#include <cuda.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#endif

#include "cuda/launch.h"

namespace moert::cuda {

// A slice of an operand in shared memory: rows of 64 16-bit elements, 128 bytes a row, in which 16-byte piece i of row
// r has the place i ^ r % 8.  So the copy engine writes it (SWIZZLE_128B) and so wgmma reads it (B128), given that a
// slice begins at a multiple of 1024 bytes, which is eight rows.  An MN-major slice, of which neighbours along K lie
// apart, is the same of every 64 rows turned: 64 along K, each of 64 elements along the rows.
constexpr int kSliceK = 64, kPiece = 8, kPieces = kSliceK / kPiece, kSliceAlign = 1024;

// The element of a slice at which a piece of a row begins.
MOERT_HOST_DEVICE constexpr int piece_place(int row, int piece) { return row * kSliceK + (piece ^ row % 8) * kPiece; }

// Four warps multiply 64 rows of one slice by all n rows of another.  Thread t of them has n / 2 of the 64 x n sums,
// values 2 j and 2 j + 1 neighbours of a row.
constexpr int kWarpgroup = 128;
MOERT_HOST_DEVICE constexpr int sum_row(int t, int i) { return t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8; }
MOERT_HOST_DEVICE constexpr int sum_column(int t, int i) { return i / 4 * 8 + t % 4 * 2 + i % 2; }

// A tensor of 16-bit elements as the copy engine sees it, the innermost dimension first; its boxes become slices.
// strides[d] are bytes from one element to the next along dimension d + 1.
struct TensorBoxes {
  const void* data;
  int rank;
  uint64_t sizes[5], strides[4];
  uint32_t box[5];
};

#if defined(__CUDACC__)

using TensorMap = CUtensorMap;

inline TensorMap tensor_map(const TensorBoxes& t) {
  static const auto encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    MOERT_CUDA_CHECK(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found));
    MOERT_CHECK(found == cudaDriverEntryPointSuccess, "the driver must have cuTensorMapEncodeTiled, got none");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
  }();
  const uint32_t steps[] = {1, 1, 1, 1, 1};
  TensorMap map;
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, uint32_t(t.rank), const_cast<void*>(t.data), t.sizes, t.strides,
             t.box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  MOERT_CHECK(result == CUDA_SUCCESS, "the driver must take a tensor for the copy engine, got error ", int(result));
  return map;
}

// An mbarrier: a phase ends when so many threads have arrived and all bytes that they said to expect are there.
struct Barrier {
  uint64_t state;
};

MOERT_DEVICE_INLINE uint32_t shared_address(const void* p) { return cute::cast_smem_ptr_to_uint(p); }

MOERT_DEVICE_INLINE void init(Barrier& b, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&b)), "r"(arrivals) : "memory");
}

// Barriers that were made are there for the copy engine too; the other threads still need a __syncthreads.
MOERT_DEVICE_INLINE void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

MOERT_DEVICE_INLINE void arrive(Barrier& b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&b)) : "memory");
}

// Thread blocks that run at once, on multiprocessors beside each other, reach each other's shared memory: what a block
// has at an address another has at the same.  Numbered from 0, one behind the other along x.
MOERT_DEVICE_INLINE int cluster_rank() { return int(cute::block_rank_in_cluster()); }

// Waits for every thread of the cluster that has not ended; also those of a warp that do not run together.
MOERT_DEVICE_INLINE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// Of another block of the cluster, or of the caller's.  Not .release.cluster, for which every arrival would wait for
// all that its thread has written on the GPU: who arrives has only read, by products that have ended.
MOERT_DEVICE_INLINE void arrive_at(Barrier& b, int block) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
      "}" ::"r"(shared_address(&b)),
      "r"(block)
      : "memory");
}

MOERT_DEVICE_INLINE void arrive_expecting(Barrier& b, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&b)), "r"(bytes)
               : "memory");
}

// Waits for the end of the newest phase of this parity; of a barrier without a past, parity 1 has ended.
MOERT_DEVICE_INLINE void wait(Barrier& b, uint32_t parity) {
  uint32_t ended = 0;
  while (!ended)
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(ended)
        : "r"(shared_address(&b)), "r"(parity)
        : "memory");
}

// The thread's writes to shared memory are there for the copy engine and wgmma.
MOERT_DEVICE_INLINE void publish_writes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The box of `map` at these coordinates into rows of a slice from a multiple of eight on, as bytes that `b` counts:
// always all of them, with zeros for what lies outside the tensor.
template <class... Coordinates>
MOERT_DEVICE_INLINE void copy_box(const TensorMap& map, Barrier& b, void* to, Coordinates... at) {
  cute::SM90_TMA_LOAD::copy(&map, &b.state, uint64_t(cute::TMA::CacheHintSm90::EVICT_NORMAL), to, at...);
}

// The same into each of the first `blocks` blocks of the cluster, whose own barriers count it.
template <class... Coordinates>
MOERT_DEVICE_INLINE void copy_box_to_all(const TensorMap& map, int blocks, Barrier& b, void* to, Coordinates... at) {
  cute::SM90_TMA_LOAD_MULTICAST::copy(&map, &b.state, uint16_t((1 << blocks) - 1),
                                      uint64_t(cute::TMA::CacheHintSm90::EVICT_NORMAL), to, at...);
}

template <int n>
MOERT_DEVICE_INLINE void take_registers() {
  cutlass::arch::warpgroup_reg_alloc<n>();
}

template <int n>
MOERT_DEVICE_INLINE void give_registers() {
  cutlass::arch::warpgroup_reg_dealloc<n>();
}

template <int... sizes>
using Sizes = cute::Shape<cute::Int<sizes>...>;

// Slices of `rows` rows, one behind the other.
template <class Element, int rows, int kStages, bool kMajor>
constexpr auto slice_layout() {
  using namespace cute::SM90::GMMA;
  constexpr Sizes<rows, kSliceK, kStages> sizes;
  if constexpr (kMajor)
    return cute::tile_to_shape(Layout_K_SW128_Atom<Element>{}, sizes);
  else
    return cute::tile_to_shape(Layout_MN_SW128_Atom<Element>{}, sizes, cute::Step<cute::_2, cute::_1, cute::_3>{});
}

// Rings of kStages slices, of 128 rows of a and n rows of b, and their descriptors, as CuTe has them.
template <class Element, int n, int kStages, bool kMajorA, bool kMajorB, int kGroups>
struct SliceRings {
  using LayoutA = decltype(slice_layout<Element, 128, kStages, kMajorA>());
  using LayoutB = decltype(slice_layout<Element, n, kStages, kMajorB>());
  static_assert(cute::cosize_v<LayoutB> == kStages * n * kSliceK);
  static constexpr auto major(bool k) { return k ? cute::SM90::GMMA::Major::K : cute::SM90::GMMA::Major::MN; }
  using Instruction = decltype(cute::SM90::GMMA::ss_op_selector<Element, Element, float, Sizes<128, n, kSliceK>,
                                                                major(kMajorA), major(kMajorB)>());
  // Groups of four warps, one below the other.
  using Mma = decltype(cute::make_tiled_mma(Instruction{}, cute::Layout<Sizes<kGroups, 1, 1>>{}));
  using Sums = decltype(cute::partition_fragment_C(Mma{}, Sizes<128, n>{}));
  static_assert(decltype(cute::size(Sums{}))::value == n / kGroups);

  // [1, 2 / kGroups or 1, 4, kStages]
  static MOERT_DEVICE_INLINE auto describe_a(Element* ring, int group) {
    const auto thread = Mma{}.get_slice(group * kWarpgroup);
    return thread.make_fragment_A(thread.partition_A(cute::make_tensor(cute::make_smem_ptr(ring), LayoutA{})));
  }
  static MOERT_DEVICE_INLINE auto describe_b(Element* ring, int group) {
    const auto thread = Mma{}.get_slice(group * kWarpgroup);
    return thread.make_fragment_B(thread.partition_B(cute::make_tensor(cute::make_smem_ptr(ring), LayoutB{})));
  }
};

// What the four warps of a group sum: its share of the 128 rows of slices of a, 64 rows after 64, times the n rows of
// slices of b.  kMajor: neighbours along K lie side by side.
template <class Element, int n, int kStages, bool kMajorA, bool kMajorB, int kGroups>
class SlicePair {
  using Rings = SliceRings<Element, n, kStages, kMajorA, kMajorB, kGroups>;
  typename Rings::Mma mma_;
  decltype(Rings::describe_a(nullptr, 0)) a_;
  decltype(Rings::describe_b(nullptr, 0)) b_;
  typename Rings::Sums c_;

 public:
  MOERT_DEVICE_INLINE SlicePair(Element* a, Element* b, int group)
      : a_(Rings::describe_a(a, group)), b_(Rings::describe_b(b, group)) {}

  // Begins to add the product of the slices of a stage, to zero where `first`.
  MOERT_DEVICE_INLINE void start(int stage, bool first) {
    using cute::_;
    mma_.accumulate_ = first ? cute::SM90::GMMA::ScaleOut::Zero : cute::SM90::GMMA::ScaleOut::One;
    cute::warpgroup_fence_operand(c_);
    cute::warpgroup_arrive();
#pragma unroll
    for (int k = 0; k < cute::size<2>(a_); ++k) {
      cute::gemm(mma_, a_(_, _, k, stage), b_(_, _, k, stage), c_);
      mma_.accumulate_ = cute::SM90::GMMA::ScaleOut::One;
    }
    cute::warpgroup_commit_batch();
  }

  // Waits for all but the newest; what the others read is read.
  template <int newest>
  MOERT_DEVICE_INLINE void finish() {
    cute::warpgroup_wait<newest>();
    cute::warpgroup_fence_operand(c_);
  }

  MOERT_DEVICE_INLINE float sum(int i) const { return c_(i); }
};

// That CuTe lays out slices and sums as this file says.
constexpr bool laid_out_as_said() {
  for (int row = 0; row < 64; ++row)
    for (int piece = 0; piece < kPieces; ++piece)
      if (cute::Swizzle<3, 4, 3>{}(row * 128 + piece * 16) != 2 * piece_place(row, piece)) return false;
  const auto turned = slice_layout<cute::half_t, 128, 2, false>().layout_b();
  for (int row = 0; row < 128; row += 5)
    for (int k = 0; k < kSliceK; k += 3)
      if (turned(row, k, 1) != 128 * kSliceK + row / 64 * 64 * kSliceK + k * 64 + row % 64) return false;
  for (int t = 0; t < kWarpgroup; t += 3)
    for (int i = 0; i < 128; ++i)
      if (cute::SM90::GMMA::CLayout_64x256{}(t, i) != sum_row(t, i) + 64 * sum_column(t, i)) return false;
  return true;
}
static_assert(laid_out_as_said());

#endif

}  // namespace moert::cuda

#if !defined(__CUDACC__)
#include "cuda/emulate_hopper.h"
#endif
