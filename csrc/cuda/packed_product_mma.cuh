// Grouped products with packed weights on tensor cores (mma.sync, sm_80 and later).
//
// The weights are the side of 16 rows, tokens that of 8: few tokens leave nothing of a product idle but their own
// columns. A warp has kTiles times 16 weight rows; of gated weights rows g and g + 8 of a tile are a gate and its up,
// so that a thread has both.  A step is 128 columns (ternary5: 160): 16-byte copies bring the codes of a warp's rows,
// each read once, and the block's rows of x to a ring in shared memory.  What a step's products are is the rows'
// matter: packed_product_floats.cuh, packed_product_codes.cuh.
//
// The order of every sum is that of the columns alone, so that all shapes of the kernel give the same bits.
#pragma once

#include "cuda/tensor_core.h"

#include "cuda/grouped_gemm_product.h"
#include "cuda/launch.h"
#include "cuda/packed_fragments.h"
#include "cuda/packed_product_mma.h"

namespace moert::cuda {

constexpr int kMmaWarps = 4;

// kUnrolled: the spans of a step are mixed by the compiler.  kBeside times 8 tokens are multiplied side by side, so
// that no product waits for the one before it.
//
// Few rows an expert: weights bound by memory, many blocks beside each other.
struct NarrowTile {
  static constexpr int kTokens = 8, kTiles = 1, kStages = 4, kBlocks = 4, kBeside = 1;
  static constexpr bool kUnrolled = true;
};
// Up to 64 rows, of which the second half is left out where none is there: decoded codes are used for all of them.
struct WideTile {
  static constexpr int kTokens = 64, kTiles = 2, kStages = 3, kBlocks = 2, kBeside = 4;
  static constexpr bool kUnrolled = false;
};
// The same for formats that hold more of the weights in registers.
struct WideOneTile : WideTile {
  static constexpr int kTiles = 1;
};

// Sums of a token, and between those of one and the next: no two that a warp writes at once meet in a bank.
template <class Shape>
constexpr int sum_stride = 16 * Shape::kTiles + 4;

// Weight row r of a warp whose first output is `first`; rows past the last are that one.
template <typename P>
MOERT_DEVICE_INLINE int64_t weight_row(const P& p, int64_t first, int r) {
  const bool gated = p.gated();
  const int64_t output = first + (gated ? r / 16 * 8 + r % 8 : r), last = p.N - 1;
  return (output < last ? output : last) + (gated ? r / 8 % 2 * p.N : 0);
}

// The weight rows of a warp, from output `first` on.
template <class Codes, int kTiles>
struct FragmentRows {
  static constexpr int kRows = 16 * kTiles, kPieces = Codes::kPieces, kCopied = kWarp / kPieces;
  static constexpr int kCopies = kRows / kCopied, kTermsTogether = 1;
  PackedWeights w;
  const uint8_t* from[kCopies];  // this lane's piece of the first step
  int32_t at_scales[kTiles][2];  // of rows g and g + 8 of each tile
  int32_t pieces;                // of a row

  MOERT_HOST_DEVICE static int stage_bytes(const PackedWeights&) { return kRows * kPieces * 16; }
  // How many sums of a span of rows of T there are, each with a scale.
  template <typename T>
  MOERT_DEVICE_INLINE static constexpr int terms() {
    return 1;
  }

  template <typename P>
  MOERT_DEVICE_INLINE FragmentRows(const P& p, int64_t expert, int64_t first) : w(p.w) {
    const int64_t rows = w.matrix.packing.rows, bands = Codes::kFormat == Format::fp8 ? fp8_blocks(rows) : rows;
    const uint8_t* codes = w.matrix.codes + expert * rows * w.row_bytes;
    // Scales and zeros are indexed from the expert's on.
    const int64_t begin = expert * bands * w.groups;
    constexpr int kBytes = Codes::kFormat == Format::fp8 ? 4 : int(scale_bytes(Codes::kFormat));
    w.matrix.scales = static_cast<const char*>(w.matrix.scales) + begin * kBytes;
    if (w.matrix.zeros) w.matrix.zeros += begin;
    pieces = int32_t(w.row_bytes / 16);
#pragma unroll
    for (int j = 0; j < kCopies; ++j)
      from[j] = codes + weight_row(p, first, lane_id() / kPieces + j * kCopied) * w.row_bytes;
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t n = weight_row(p, first, 16 * i + 8 * half + lane_id() / 4);
        at_scales[i][half] = int32_t(Codes::kFormat == Format::fp8 ? n / kFp8Block : n) * w.groups;
      }
  }

  MOERT_DEVICE_INLINE void copy(int step, char* to) const {
    const int piece = lane_id() % kPieces, at = step * kPieces + piece;
    const bool inside = at < pieces;
#pragma unroll
    for (int j = 0; j < kCopies; ++j) {
      const int row = lane_id() / kPieces + j * kCopied;
      copy_async(to + (row * kPieces + Codes::place(row, piece)) * 16, inside ? from[j] + int64_t(at) * 16 : nullptr,
                 inside);
    }
  }

  // Lane t of a row reads the scale of span t; past the last column that of the last group, times zeros of x.
  MOERT_DEVICE_INLINE void read_scales(int step, uint32_t (&out)[kTiles][2]) const {
    const int g = (step * step_columns(Codes::kFormat) + lane_id() % 4 * kSpanColumns) >> w.group_shift;
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        out[i][half] = Codes::read(w, at_scales[i][half] + (g < w.groups ? g : w.groups - 1));
  }

  // Of a span, of which `bits` are what was read.
  template <typename T>
  MOERT_DEVICE_INLINE float scale(int, int, int, int, uint32_t bits) const {
    return Codes::scale(bits);
  }
  template <typename T>
  MOERT_DEVICE_INLINE void pairs(int, const char* codes, int row, int span, uint32_t bits, uint32_t (&out)[4]) const {
    Codes::template pairs<T>(codes, row, span, lane_id() % 4, bits, out);
  }
};

// What lanes of a row that were each given one of four spans have of `span`.
MOERT_DEVICE_INLINE uint32_t of_span(uint32_t bits, int span) {
  return __shfl_sync(kAllLanes, bits, (lane_id() & ~3) + span % 4);
}

// The rows of x that a block multiplies, zeros past the last.
template <class X, class Shape>
struct RowLoader {
  static constexpr int kPieces = X::kPieces, kAll = Shape::kTokens * kPieces;
  static constexpr int kFewest = Shape::kTokens == 8 ? 2 * kWarp : kMmaWarps * kWarp;  // threads
  static constexpr int kCopies = (kAll + kFewest - 1) / kFewest;
  const char* x;
  int64_t stride;  // bytes
  int32_t rows[kCopies];

  template <typename P>
  MOERT_DEVICE_INLINE RowLoader(const P& p, const RowTile& tile)
      : x(static_cast<const char*>(p.x)), stride(p.x_stride * X::kElement) {
#pragma unroll
    for (int j = 0; j < kCopies; ++j) {
      const int token = index(j) / kPieces, s = tile.row + token;
      rows[j] = token >= tile.rows ? -1 : p.index ? p.index[s] : s;
    }
  }
  MOERT_DEVICE_INLINE static int index(int j) { return int(threadIdx.x + j * blockDim.x); }

  MOERT_DEVICE_INLINE void copy(int step, char* to) const {
#pragma unroll
    for (int j = 0; j < kCopies; ++j) {
      const int row = index(j) / kPieces, piece = index(j) % kPieces;
      if (row >= Shape::kTokens) continue;
      const bool inside = rows[j] >= 0;
      copy_async(to + X::template place<Shape>(row, piece) * 16,
                 inside ? x + rows[j] * stride + int64_t(step) * X::kStepBytes + piece * 16 : nullptr, inside);
    }
  }
};

// What has nothing to do at the end.
template <class Shape>
MOERT_DEVICE_INLINE void copy_sums(const float (&sums)[Shape::kTiles][Shape::kTokens / 8][4],
                                   float (&out)[Shape::kTiles][Shape::kTokens / 8][4]) {
#pragma unroll
  for (int i = 0; i < Shape::kTiles; ++i)
#pragma unroll
    for (int n = 0; n < Shape::kTokens / 8; ++n)
#pragma unroll
      for (int v = 0; v < 4; ++v) out[i][n][v] = sums[i][n][v];
}

// A warp's sums through `memory`, by token, to y: neighbours go to neighbours, and what becomes of a sum is in the code
// once.
template <class Shape>
MOERT_DEVICE_INLINE void store_sums(const PackedProduct<float>& p, const RowTile& tile, int64_t first,
                                    const float (&sums)[Shape::kTiles][Shape::kTokens / 8][4], float* memory) {
  constexpr int kStride = sum_stride<Shape>;
  const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
  for (int i = 0; i < Shape::kTiles; ++i)
#pragma unroll
    for (int n = 0; n < Shape::kTokens / 8; ++n)
#pragma unroll
      for (int v = 0; v < 4; ++v) memory[(n * 8 + 2 * t + v % 2) * kStride + 16 * i + v / 2 * 8 + g] = sums[i][n][v];
  __syncwarp();
  const bool gated = p.gated();
  const int outputs = gated ? 8 * Shape::kTiles : 16 * Shape::kTiles;
#pragma unroll 1
  for (int i = lane_id(); i < tile.rows * outputs; i += kWarp) {
    const int token = i / outputs, n = i % outputs;
    const float* from = memory + token * kStride + (gated ? n / 8 * 16 + n % 8 : n);
    p.store(tile.expert, tile.row + token, first + n, from[0], gated ? from[8] : 0);
  }
}

template <class Codes, class X, class Shape>
__global__ void __launch_bounds__(kMmaWarps* kWarp, Shape::kBlocks)
    packed_product_mma(const __grid_constant__ PackedProduct<float> p) {
  MOERT_SHARED(char, shared);
  using Weights = FragmentRows<Codes, Shape::kTiles>;
  constexpr int kStages = Shape::kStages, kRows = 16 * Shape::kTiles, kXBytes = Shape::kTokens * X::kPieces * 16;
  const int warps = int(blockDim.x) / kWarp, outputs = p.gated() ? kRows / 2 : kRows;
  const int64_t columns = (p.written + warps * outputs - 1) / (warps * outputs);
  const TileIndex at = banded(blockIdx.x, p.tiles, columns, kBand);
  const RowTile tile = p.template tile<Shape::kTokens>(at.row);
  if (tile.rows == 0 || tile.expert >= p.E) return;

  const int64_t first = (at.column * warps + warp_id()) * outputs;
  Weights weights(p, tile.expert, first);
  const RowLoader<X, Shape> rows(p, tile);
  const int steps = int(p.x_stride * X::kElement / X::kStepBytes), stage_bytes = Weights::stage_bytes(p.w);
  char* const my_codes = shared + kStages * kXBytes + warp_id() * kStages * stage_bytes;
  const auto load = [&](int step, int stage) {
    if (step < steps) {
      weights.copy(step, my_codes + stage * stage_bytes);
      rows.copy(step, shared + stage * kXBytes);
    }
    close_group();
  };

  // Fill the ring
  uint32_t scales[kStages][Shape::kTiles][2] = {};
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) {
    if (stage < kStages - 1) load(stage, stage);
    if (stage < steps) weights.read_scales(stage, scales[stage]);
  }
  typename X::Sum sums[Shape::kTiles][Shape::kTokens / 8][4] = {};
#pragma unroll 1
  for (int ring = 0; ring < steps; ring += kStages) {
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
      const int step = ring + stage;
      if (step >= steps) break;
      // Wait for this step, and for every warp to have left the buffer that the next copy fills
      wait_groups<kStages - 2>();
      __syncthreads();
      load(step + kStages - 1, (stage + kStages - 1) % kStages);
      X::template multiply_step<Shape>(weights, shared + stage * kXBytes, my_codes + stage * stage_bytes, step,
                                       scales[stage], tile.rows, sums);
      if (step + kStages < steps) weights.read_scales(step + kStages, scales[stage]);
    }
  }
  // The sums go where the ring was
  wait_groups<0>();
  __syncthreads();
  constexpr int kSums = Shape::kTokens * sum_stride<Shape>;
  float out[Shape::kTiles][Shape::kTokens / 8][4];
  X::template finish<Shape>(p, tile, weights, sums, out);
  store_sums<Shape>(p, tile, first, out, reinterpret_cast<float*>(shared) + warp_id() * kSums);
}

// Blocks of a GPU's multiprocessors, four on each: fewer are made smaller, so that all have some.
constexpr int64_t kManyBlocks = 4 * 132;
constexpr int kMostShared = 96 * 1024;  // of what any GPU from sm_80 on gives a block

template <class Codes, class X, class Shape>
void start_mma(PackedProduct<float> p, [[maybe_unused]] void* stream) {
  p.tile_rows(Shape::kTokens);
  const int rows = 16 * Shape::kTiles, outputs = p.gated() ? rows / 2 : rows;
  const auto blocks_of = [&](int warps) { return p.tiles * ceil_div(p.written, warps * outputs); };
  const int warps = Shape::kTokens == 8 && blocks_of(kMmaWarps) < kManyBlocks ? kMmaWarps / 2 : kMmaWarps;
  const int64_t blocks = blocks_of(warps);
  const int ring = Shape::kStages *
                   (Shape::kTokens * X::kPieces * 16 + warps * FragmentRows<Codes, Shape::kTiles>::stage_bytes(p.w));
  const int sums = warps * Shape::kTokens * sum_stride<Shape> * int(sizeof(float)), shared = ring > sums ? ring : sums;
  MOERT_CHECK(shared <= kMostShared, "a block must have at most ", kMostShared, " bytes, got ", shared);
  MOERT_CHECK(blocks <= 0x7fffffff, "a grouped product must have at most 2^31 - 1 tiles, got ", blocks);
  const auto kernel = &packed_product_mma<Codes, X, Shape>;
#if defined(__CUDACC__)
  // The same for every launch of a kernel: threads that start it at once would take each other's away.
  MOERT_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                        cudaFuncAttributeMaxDynamicSharedMemorySize, kMostShared));
  kernel<<<unsigned(blocks), warps * kWarp, shared, static_cast<cudaStream_t>(stream)>>>(p);
  MOERT_CUDA_CHECK(cudaGetLastError());
#else
  emulate::run({unsigned(blocks), 1, 1}, unsigned(warps * kWarp), size_t(shared), [&] { kernel(p); });
#endif
}

// Narrow or wide: the host does not know how many rows an expert has, so as many as all have on average.
template <class Codes, class X, class Wide = WideTile>
void multiply_mma(const PackedProduct<float>& p, void* stream) {
  const bool few = p.S <= int64_t(p.E) * NarrowTile::kTokens;
  few ? start_mma<Codes, X, NarrowTile>(p, stream) : start_mma<Codes, X, Wide>(p, stream);
}

}  // namespace moert::cuda
