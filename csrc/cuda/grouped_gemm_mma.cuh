// Grouped GEMM on the tensor cores of every GPU from sm_80 on: cp.async, ldmatrix and mma.sync.
//
// One thread block computes one tile of 128 x 128.  Its four warps copy the operands' slices of kK into a ring of
// kStages buffers in shared memory, three slices ahead of the one they multiply.  Blocks are not persistent: two of
// them share a multiprocessor, so that the first slices of one arrive while the other multiplies, and the hardware
// gives the next tile to whichever ends first, which evens out experts of different sizes.
//
// An operand is K-major where the elements along the summed dimension lie side by side, else MN-major:
//   forward   x [S, K] K-major      w [E, N, K] K-major or [E, K, N] MN-major
//   wgrad     dy [S, N] MN-major    x [S, K] MN-major, summed over an expert's slots
// Rows are copied one 16-byte piece at a time from wherever they lie, so that gathered rows cost nothing more.
#pragma once

#include "cuda/tensor_core.h"

#include "cuda/activation_backward.h"
#include "cuda/expert_tiles.h"
#include "cuda/grouped_gemm_product.h"

namespace moert::cuda {

using cute::_;
using cute::Int;

// Number of threads and sizes of a tile.  A slice of K is 64 bytes of a K-major row.
template <class Element_>
struct Tile {
  using Element = Element_;
  static constexpr int kM = kMmaTile, kN = kMmaTile, kK = 64 / sizeof(Element), kStages = 4, kThreads = 128;
  static constexpr int kPiece = 16 / sizeof(Element);  // elements of one 16-byte copy
};

// What differs with the element: the instruction, the swizzle of shared memory (16-byte pieces of rows of 64 bytes
// where K-major, of 128 bytes where MN-major; no two of the eight that ldmatrix reads at once meet in a bank) and how
// fragments leave shared memory.  ldmatrix transposes 16-bit elements only.
template <class Element>
struct Mma16 {
  using KMajorAtom = decltype(cute::composition(
      cute::Swizzle<2, 3, 3>{}, cute::Layout<cute::Shape<Int<8>, Int<32>>, cute::Stride<Int<32>, Int<1>>>{}));
  using MnMajorAtom = decltype(cute::composition(
      cute::Swizzle<3, 3, 3>{}, cute::Layout<cute::Shape<Int<64>, Int<8>>, cute::Stride<Int<1>, Int<64>>>{}));
  using KMajorCopy = cute::Copy_Atom<Ldmatrix, Element>;
  using MnMajorCopy = cute::Copy_Atom<LdmatrixTransposed, Element>;
  static constexpr int kInstructionK = 16;
};

template <class Element>
struct MmaOf;
template <>
struct MmaOf<cute::bfloat16_t> : Mma16<cute::bfloat16_t> {
  using Atom = MmaBf16;
};
template <>
struct MmaOf<cute::half_t> : Mma16<cute::half_t> {
  using Atom = MmaF16;
};
template <>
struct MmaOf<cute::tfloat32_t> {
  using Atom = MmaTf32;
  using KMajorAtom = decltype(cute::composition(
      cute::Swizzle<2, 2, 3>{}, cute::Layout<cute::Shape<Int<8>, Int<16>>, cute::Stride<Int<16>, Int<1>>>{}));
  using MnMajorAtom = decltype(cute::composition(
      cute::Swizzle<3, 2, 3>{}, cute::Layout<cute::Shape<Int<32>, Int<8>>, cute::Stride<Int<1>, Int<32>>>{}));
  using KMajorCopy = cute::Copy_Atom<Ldmatrix, cute::tfloat32_t>;
  using MnMajorCopy = cute::Copy_Atom<cute::UniversalCopy<cute::tfloat32_t>, cute::tfloat32_t>;
  static constexpr int kInstructionK = 8;
};

enum class Major { k, mn };

// Shared memory of one operand, [128, kK, kStages], and the copy of its fragments.
template <class Element, Major major>
struct Staged {
  using T = Tile<Element>;
  using Atom =
      std::conditional_t<major == Major::k, typename MmaOf<Element>::KMajorAtom, typename MmaOf<Element>::MnMajorAtom>;
  using Copy =
      std::conditional_t<major == Major::k, typename MmaOf<Element>::KMajorCopy, typename MmaOf<Element>::MnMajorCopy>;
  using Layout = decltype(cute::tile_to_shape(Atom{}, cute::Shape<Int<T::kM>, Int<T::kK>, Int<T::kStages>>{}));
};

// Copies slices of an operand.  Four neighbouring threads copy a K-major row's 64 bytes, sixteen (of tf32: thirty-two)
// an MN-major row.  `begin(i)` of a K-major operand is where row i of the tile starts, of an MN-major operand where
// piece i of row 0 starts; null: zeros.
template <class Element, Major major>
struct Loader;

template <class Element>
struct Loader<Element, Major::k> {
  using T = Tile<Element>;
  static constexpr int kPieces = T::kK / T::kPiece, kRows = T::kThreads / kPieces, kCopies = T::kM / kRows;
  const Element* from[kCopies];
  int piece, row, K;

  template <class Begin>
  __device__ Loader(int K, const Begin& begin)
      : piece(threadIdx.x % kPieces * T::kPiece), row(threadIdx.x / kPieces), K(K) {
    for (int i = 0; i < kCopies; ++i) from[i] = begin(row + i * kRows);
  }

  template <class Slice>
  __device__ void load(int k, const Slice& to) {
    const bool inside = k + piece < K;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const bool here = inside && from[i];
      copy_async(&to(row + i * kRows, piece), here ? from[i] + k + piece : nullptr, here);
    }
  }
};

template <class Element>
struct Loader<Element, Major::mn> {
  using T = Tile<Element>;
  static constexpr int kPieces = T::kM / T::kPiece, kRows = T::kThreads / kPieces, kCopies = T::kK / kRows;
  const Element* from;
  const int32_t* index;
  int64_t stride, count;
  int piece, row, K;
  int32_t stored[kCopies];  // of the next slice: an index is read one slice before the row that it names

  template <class Begin>
  __device__ Loader(int K, int64_t stride, const int32_t* index, int64_t count, const Begin& begin)
      : index(index), stride(stride), count(count), row(threadIdx.x / kPieces), K(K) {
    piece = threadIdx.x % kPieces;
    from = begin(piece);
    find(0);
  }

  __device__ void find(int k) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int r = k + row + i * kRows;
      stored[i] = !index || r >= K ? r : index[r];
    }
  }

  template <class Slice>
  __device__ void load(int k, const Slice& to) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const bool here = from && uint64_t(stored[i]) < uint64_t(count) && k + row + i * kRows < K;
      copy_async(&to(piece * T::kPiece, row + i * kRows), here ? from + stored[i] * stride : nullptr, here);
    }
    find(k + T::kK);
  }
};

template <class Element>
using TiledMma =
    decltype(cute::make_tiled_mma(typename MmaOf<Element>::Atom{}, cute::Layout<cute::Shape<Int<2>, Int<2>>>{},
                                  cute::Tile<Int<32>, Int<32>, Int<MmaOf<Element>::kInstructionK>>{}));

// A float keeps 10 bits of its mantissa in a tensor core; rounded to them, not cut off.
template <class Fragment>
__device__ void round_fragment(Fragment& fragment) {
  if constexpr (std::is_same_v<typename Fragment::value_type, cute::tfloat32_t>) {
#pragma unroll
    for (int i = 0; i < cute::size(fragment); ++i) fragment(i) = cute::tfloat32_t(bits_to_float(fragment(i).raw()));
  }
}

// c = sum over K of a tile's rows of a times those of b.
template <class Element, Major major_a, Major major_b, class Accumulator>
__device__ void multiply_tile(Loader<Element, major_a>& load_a, Loader<Element, major_b>& load_b, int K, char* shared,
                              Accumulator& c) {
  using namespace cute;
  using T = moert::cuda::Tile<Element>;
  using StagedA = Staged<Element, major_a>;
  using StagedB = Staged<Element, major_b>;
  auto* a_memory = reinterpret_cast<Element*>(shared);
  const Tensor a = make_tensor(make_smem_ptr(a_memory), typename StagedA::Layout{});  // [kM, kK, kStages]
  const Tensor b = make_tensor(make_smem_ptr(a_memory + cosize_v<typename StagedA::Layout>),
                               typename StagedB::Layout{});  // [kN, kK, kStages]

  const TiledMma<Element> mma;
  const auto thread = mma.get_thread_slice(threadIdx.x);
  Tensor a_fragment = thread.partition_fragment_A(a(_, _, 0));  // [8 values, M / 32, K / 16]
  Tensor b_fragment = thread.partition_fragment_B(b(_, _, 0));  // [4 values, N / 16, K / 16]
  const auto a_copy = make_tiled_copy_A(typename StagedA::Copy{}, mma).get_slice(threadIdx.x);
  const auto b_copy = make_tiled_copy_B(typename StagedB::Copy{}, mma).get_slice(threadIdx.x);
  const Tensor a_from = a_copy.partition_S(a);  // [values, M, K, kStages]
  const Tensor b_from = b_copy.partition_S(b);
  Tensor a_to = a_copy.retile_D(a_fragment);
  Tensor b_to = b_copy.retile_D(b_fragment);

  const int slices = (K + T::kK - 1) / T::kK;
  const auto load = [&](int slice) {
    if (slice < slices) {
      load_a.load(slice * T::kK, a(_, _, slice % T::kStages));
      load_b.load(slice * T::kK, b(_, _, slice % T::kStages));
    }
    close_group();
  };

  // Fill the ring
  for (int slice = 0; slice < T::kStages - 1; ++slice) load(slice);
  clear(c);
  for (int slice = 0; slice < slices; ++slice) {
    // Wait for this slice, and for every warp to have left the buffer that the next copy fills
    wait_groups<T::kStages - 2>();
    __syncthreads();
    load(slice + T::kStages - 1);

    // Multiply
    const int stage = slice % T::kStages;
#pragma unroll
    for (int k = 0; k < size<2>(a_fragment); ++k) {
      copy(typename StagedA::Copy{}, a_from(_, _, k, stage), a_to(_, _, k));
      copy(typename StagedB::Copy{}, b_from(_, _, k, stage), b_to(_, _, k));
      auto a_now = a_fragment(_, _, k);
      auto b_now = b_fragment(_, _, k);
      round_fragment(a_now);
      round_fragment(b_now);
      gemm(mma, a_now, b_now, c);
    }
  }
  wait_groups<0>();
}

template <class Element>
__device__ auto accumulator() {
  using T = Tile<Element>;
  return cute::partition_fragment_C(TiledMma<Element>{}, cute::Shape<Int<T::kM>, Int<T::kN>>{});
}

// Columns that one thread stores at once.
constexpr int kStored = 8;

// Sums on their way from fragments to rows, in the memory of the ring: float [kM, kN], groups of eight columns
// exchanged within a row so that the four rows that half a warp writes at once meet in no bank.
struct Sums {
  float* data;
  __device__ float* at(int row, int group) const { return data + row * kMmaTile + (group ^ (row & 3)) * kStored; }
  __device__ void read(int row, int group, float (&values)[kStored]) const {
    const auto* from = reinterpret_cast<const float4*>(at(row, group));
    const float4 low = from[0], high = from[1];
    values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
    values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
  }
};

template <class Element, class Accumulator>
__device__ Sums spread(const Accumulator& c, char* shared) {
  using namespace cute;
  using T = moert::cuda::Tile<Element>;
  const Sums sums{reinterpret_cast<float*>(shared)};
  const auto thread = TiledMma<Element>{}.get_thread_slice(threadIdx.x);
  const Tensor places = thread.partition_C(make_identity_tensor(Shape<Int<T::kM>, Int<T::kN>>{}));
  __syncthreads();
#pragma unroll
  for (int i = 0; i < size(c); i += 2) {
    const int row = get<0>(places(i)), column = get<1>(places(i));
    *reinterpret_cast<float2*>(sums.at(row, column / kStored) + column % kStored) = make_float2(c(i), c(i + 1));
  }
  __syncthreads();
  return sums;
}

// How the tile's columns of w hold a gate and an up half.
//   apart      eight columns of the gate, then the same eight of up, so that both are values of one thread
//   alternate  in turns, as an MN-major w1 of alternating columns lies in memory
enum class Gates { none, apart, alternate };

// The ring of both operands, in whose place the sums come.
template <class Element>
constexpr int kSharedBytes =
    (Tile<Element>::kM + Tile<Element>::kN) * Tile<Element>::kK * Tile<Element>::kStages * int(sizeof(Element));
static_assert(kSharedBytes<cute::half_t> == kMmaTile * kMmaTile * sizeof(float));
static_assert(kSharedBytes<cute::tfloat32_t> == kMmaTile * kMmaTile * sizeof(float));

// A row of the tile of weights that column n of the tile comes from; null outside.
template <Gates kGates, class T, class To>
__device__ const T* weight_at(const Product<T, To>& p, int64_t expert, int64_t first, int n) {
  if constexpr (kGates == Gates::apart) {
    const int64_t row = first + n / 16 * 8 + n % 8;
    return row < p.N ? (n / 8 % 2 ? p.up : p.w).at(expert, row, 0) : nullptr;
  } else if constexpr (kGates == Gates::alternate) {
    return first + n / 2 < p.N ? p.w.at(expert, first + n / 2, 0) : nullptr;
  } else {
    return first + n < p.N ? p.w.at(expert, first + n, 0) : nullptr;
  }
}

// The tile's rows through the epilogue, eight columns of y a thread.
template <Gates kGates, class T, class To>
__device__ void store_tile(const Product<T, To>& p, const RowTile& rows, int64_t first, const Sums& sums) {
  constexpr int kGroups = kMmaTile / kStored / (kGates == Gates::none ? 1 : 2);
  const auto store = [&](int row, int group) {
    float gate[kStored], up[kStored];
    if constexpr (kGates == Gates::none) {
      sums.read(row, group, gate);
    } else {
      sums.read(row, 2 * group, gate);
      sums.read(row, 2 * group + 1, up);
    }
    if constexpr (kGates == Gates::alternate) separate(gate, up);
    return p.epilogue.store(rows.expert, rows.row + row, first + group * kStored, gate,
                            kGates == Gates::none ? gate : up);
  };
  // Whole warps: sums go along neighbouring threads.
#pragma unroll 1
  for (int i = threadIdx.x; i < (rows.rows * kGroups + kWarp - 1) / kWarp * kWarp; i += blockDim.x) {
    const int row = i / kGroups, group = i % kGroups;
    const bool inside = row < rows.rows && first + group * kStored < p.N;
    if constexpr (To::kSumsRows) {
      constexpr int kNeighbours = kDotColumns / kStored;
      const float sum = warp_sum<kNeighbours>(inside ? store(row, group) : 0.0f);
      if (inside && group % kNeighbours == 0) p.epilogue.put_sum(rows.row + row, first + group * kStored, sum);
    } else if (inside) {
      store(row, group);
    }
  }
}

template <class Element, Major kMajorW, Gates kGates, class T, class To>
__global__ void __launch_bounds__(Tile<Element>::kThreads, 2)
    grouped_gemm_mma(const __grid_constant__ Product<T, To> p) {
  MOERT_SHARED(char, shared);
  constexpr int kColumns = kGates == Gates::none ? kMmaTile : kMmaTile / 2;
  const int64_t columns = (p.N + kColumns - 1) / kColumns;
  const TileIndex tile = banded(blockIdx.x, num_row_tiles(p.S, p.E, kMmaTile), columns, kBand);
  const RowTile rows = row_tile(p.offsets, p.E, p.S, kMmaTile, int32_t(tile.row));
  if (rows.rows == 0) return;
  const int64_t first = tile.column * kColumns;
  if (rows.expert == p.E) {
    for (int i = threadIdx.x; i < rows.rows * kColumns; i += Tile<Element>::kThreads)
      if (first + i % kColumns < p.N) p.epilogue.clear(rows.row + i / kColumns, first + i % kColumns);
    return;
  }

  const auto element = [](const T* from) { return reinterpret_cast<const Element*>(from); };
  const auto x_row = [&](int m) { return m < rows.rows ? element(p.x.row(rows.row + m)) : nullptr; };
  const auto w_row = [&](int n) { return element(weight_at<kGates>(p, rows.expert, first, n)); };
  const auto w_piece = [&](int piece) { return w_row(piece * Tile<Element>::kPiece); };
  Loader<Element, Major::k> load_x(int(p.K), x_row);
  auto load_w = [&] {
    if constexpr (kMajorW == Major::k)
      return Loader<Element, Major::k>(int(p.K), w_row);
    else
      return Loader<Element, Major::mn>(int(p.K), p.w.column, nullptr, p.K, w_piece);
  }();
  auto c = accumulator<Element>();
  multiply_tile(load_x, load_w, int(p.K), shared, c);
  store_tile<kGates>(p, rows, first, spread<Element>(c, shared));
}

template <class Element, class T>
__global__ void __launch_bounds__(Tile<Element>::kThreads, 2)
    grouped_gemm_wgrad_mma(const __grid_constant__ Gradient<T> p) {
  MOERT_SHARED(char, shared);
  const int64_t rows = (p.N + kMmaTile - 1) / kMmaTile, columns = (p.K + kMmaTile - 1) / kMmaTile;
  const int64_t e = blockIdx.x / (rows * columns);
  const TileIndex tile = banded(blockIdx.x % (rows * columns), rows, columns, kBand);
  const int64_t n0 = tile.row * kMmaTile, k0 = tile.column * kMmaTile;
  const Slots slots = slots_of(p.offsets, e, p.S);
  if (p.onto && slots.count == 0) return;

  const auto loader = [&](const RowsOf<T>& from, int64_t first, int64_t size) {
    const T* row0 = from.data + first + (from.index ? 0 : slots.begin * from.stride);
    const auto piece = [&](int i) {
      const int at = i * Tile<Element>::kPiece;
      return first + at < size ? reinterpret_cast<const Element*>(row0 + at) : nullptr;
    };
    return Loader<Element, Major::mn>(slots.count, from.stride, from.index ? from.index + slots.begin : nullptr,
                                      from.count, piece);
  };
  auto load_dy = loader(p.dy, n0, p.N);
  auto load_x = loader(p.x, k0, p.K);
  auto c = accumulator<Element>();
  multiply_tile(load_dy, load_x, slots.count, shared, c);
  const Sums sums = spread<Element>(c, shared);
  constexpr int kGroups = kMmaTile / kStored;
#pragma unroll 1
  for (int i = threadIdx.x; i < kMmaTile * kGroups; i += blockDim.x) {
    const int64_t row = n0 + i / kGroups, column = k0 + i % kGroups * kStored;
    if (row >= p.N || column >= p.K) continue;
    float values[kStored];
    sums.read(i / kGroups, i % kGroups, values);
    p.store(e, row, column, values);
  }
}

}  // namespace moert::cuda
