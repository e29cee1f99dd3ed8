// Grouped products with packed weights on tensor cores (mma.sync, sm_80 and later), rows of bf16 or f16.
//
// The weights are the side of 16 rows, tokens that of 8: few tokens leave nothing of a product idle but their own
// columns. A warp has kTiles times 16 weight rows; of gated weights rows g and g + 8 of a tile are a gate and its up,
// so that a thread has both.  A step is 128 columns: 16-byte copies bring the codes of a warp's rows, each read once,
// and the block's rows of x to a ring in shared memory.  The codes become bf16 or f16 in registers, exactly, and every
// span of 32 columns is multiplied from zero on and then scaled in float32.
//
// The order of every sum is that of the columns alone, so that all shapes of the kernel give the same bits.
#pragma once

#include "cuda/tensor_core.h"

#include "cuda/grouped_gemm_product.h"
#include "cuda/packed_fragments.h"
#include "cuda/packed_product_mma.h"

namespace moert::cuda {

constexpr int kMmaWarps = 4, kSpans = kStepColumns / kSpanColumns;
constexpr int kRowPieces = kStepColumns / 8;  // of 16 bytes in a row of x

// kUnrolled spans of a step are mixed by the compiler, and kBeside times 8 tokens multiplied side by side, so that no
// product waits for the one before it.
//
// Few rows an expert: weights bound by memory, many blocks beside each other.
struct NarrowTile {
  static constexpr int kTokens = 8, kTiles = 1, kStages = 4, kBlocks = 4, kUnrolled = 4, kBeside = 1;
};
// Up to 64 rows, of which the second half is left out where none is there: decoded codes are used for all of them.
struct WideTile {
  static constexpr int kTokens = 64, kTiles = 2, kStages = 3, kBlocks = 2, kUnrolled = 1, kBeside = 4;
};

template <class Codes, class Shape>
constexpr int packed_mma_shared(int warps) {
  return Shape::kStages * 16 * (Shape::kTokens * kRowPieces + warps * 16 * Shape::kTiles * Codes::kPieces);
}

// Sums of a token, and between those of one and the next: no two that a warp writes at once meet in a bank.
template <class Shape>
constexpr int sum_stride = 16 * Shape::kTiles + 4;

template <typename T>
struct MmaFor;
template <>
struct MmaFor<bf16> {
  using Type = MmaBf16;
};
template <>
struct MmaFor<f16> {
  using Type = MmaF16;
};

// The weight rows of a warp, from output `first` on.
template <class Codes, int kTiles>
struct FragmentRows {
  static constexpr int kRows = 16 * kTiles, kPieces = Codes::kPieces, kCopied = kWarp / kPieces;
  static constexpr int kCopies = kRows / kCopied;
  PackedWeights w;
  const uint8_t* from[kCopies];  // this lane's piece of the first step
  int32_t scales[kTiles][2];     // of rows g and g + 8 of each tile
  int32_t pieces;                // of a row

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
    const auto row_of = [&](int r) {
      const bool gated = p.gated();
      const int64_t output = first + (gated ? r / 16 * 8 + r % 8 : r), last = p.N - 1;
      return (output < last ? output : last) + (gated ? r / 8 % 2 * p.N : 0);
    };
#pragma unroll
    for (int j = 0; j < kCopies; ++j) from[j] = codes + row_of(lane_id() / kPieces + j * kCopied) * w.row_bytes;
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t n = row_of(16 * i + 8 * half + lane_id() / 4);
        scales[i][half] = int32_t(Codes::kFormat == Format::fp8 ? n / kFp8Block : n) * w.groups;
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
    const int g = (step * kStepColumns + lane_id() % 4 * kSpanColumns) >> w.group_shift;
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        out[i][half] = Codes::read(w, scales[i][half] + (g < w.groups ? g : w.groups - 1));
  }
};

// The rows of x that a block multiplies, zeros past the last.
template <class Shape>
struct RowLoader {
  static constexpr int kCopies = Shape::kTokens * kRowPieces / (Shape::kTokens == 8 ? 2 * kWarp : kMmaWarps * kWarp);
  const char* x;
  int64_t stride;  // bytes
  int32_t rows[kCopies];

  template <typename P>
  MOERT_DEVICE_INLINE RowLoader(const P& p, const RowTile& tile)
      : x(static_cast<const char*>(p.x) + threadIdx.x % kRowPieces * 16), stride(p.x_stride * 2) {
#pragma unroll
    for (int j = 0; j < kCopies; ++j) {
      const int token = row(j), s = tile.row + token;
      rows[j] = token >= tile.rows ? -1 : p.index ? p.index[s] : s;
    }
  }
  MOERT_DEVICE_INLINE static int row(int j) { return int(threadIdx.x + j * blockDim.x) / kRowPieces; }
  // Half a 128-byte line is exchanged in every second row, so that the two rows that eight lanes read share no bank.
  MOERT_DEVICE_INLINE static int place(int row, int piece) { return row * kRowPieces + (piece ^ row % 2 * 4); }

  MOERT_DEVICE_INLINE void copy(int step, char* to) const {
#pragma unroll
    for (int j = 0; j < kCopies; ++j) {
      if (row(j) >= Shape::kTokens) continue;
      const bool inside = rows[j] >= 0;
      copy_async(to + place(row(j), threadIdx.x % kRowPieces) * 16,
                 inside ? x + rows[j] * stride + int64_t(step) * (2 * kStepColumns) : nullptr, inside);
    }
  }
};

// sums += the products of one step.
template <class Codes, typename T, class Shape>
MOERT_DEVICE_INLINE void multiply_step(const char* x, const char* codes, const uint32_t (&scales)[Shape::kTiles][2],
                                       int rows, float (&sums)[Shape::kTiles][Shape::kTokens / 8][4]) {
  using Mma = typename MmaFor<T>::Type;
  const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll Shape::kUnrolled
  for (int span = 0; span < kSpans; ++span) {
    // Decode
    uint32_t a[Shape::kTiles][2][4];
    float scale[Shape::kTiles][2];
#pragma unroll
    for (int i = 0; i < Shape::kTiles; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t bits = __shfl_sync(kAllLanes, scales[i][half], (lane_id() & ~3) + span);
        scale[i][half] = Codes::scale(bits);
        Codes::template pairs<T>(codes, 16 * i + 8 * half + g, span, t, bits, a[i][half]);
      }
    // Multiply
#pragma unroll
    for (int first = 0; first < Shape::kTokens / 8; first += Shape::kBeside) {
      if (first > 0 && first * 8 >= rows) break;
      Chunk b[Shape::kBeside];
#pragma unroll
      for (int n = 0; n < Shape::kBeside; ++n)
        b[n] = load_chunk(x + RowLoader<Shape>::place((first + n) * 8 + g, span * 4 + t) * 16);
#pragma unroll
      for (int i = 0; i < Shape::kTiles; ++i) {
        float c[Shape::kBeside][4] = {};
#pragma unroll
        for (int k = 0; k < 2; ++k)
#pragma unroll
          for (int n = 0; n < Shape::kBeside; ++n)
            Mma::fma(c[n][0], c[n][1], c[n][2], c[n][3], a[i][0][2 * k], a[i][1][2 * k], a[i][0][2 * k + 1],
                     a[i][1][2 * k + 1], b[n].words[2 * k], b[n].words[2 * k + 1], c[n][0], c[n][1], c[n][2], c[n][3]);
#pragma unroll
        for (int n = 0; n < Shape::kBeside; ++n)
#pragma unroll
          for (int v = 0; v < 4; ++v) sums[i][first + n][v] += scale[i][v / 2] * c[n][v];
      }
    }
  }
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

template <class Codes, typename T, class Shape>
__global__ void __launch_bounds__(kMmaWarps* kWarp, Shape::kBlocks)
    packed_product_mma(const __grid_constant__ PackedProduct<float> p) {
  MOERT_SHARED(char, shared);
  constexpr int kStages = Shape::kStages, kRows = 16 * Shape::kTiles;
  constexpr int kXBytes = Shape::kTokens * kRowPieces * 16, kWarpBytes = kRows * Codes::kPieces * 16;
  const int warps = int(blockDim.x) / kWarp, outputs = p.gated() ? kRows / 2 : kRows;
  const int64_t columns = (p.written + warps * outputs - 1) / (warps * outputs);
  const TileIndex at = banded(blockIdx.x, p.tiles, columns, kBand);
  const RowTile tile = p.template tile<Shape::kTokens>(at.row);
  if (tile.rows == 0 || tile.expert >= p.E) return;

  const int64_t first = (at.column * warps + warp_id()) * outputs;
  const FragmentRows<Codes, Shape::kTiles> weights(p, tile.expert, first);
  const RowLoader<Shape> rows(p, tile);
  const int steps = int(p.x_stride / kStepColumns);
  char* const my_codes = shared + kStages * kXBytes + warp_id() * kStages * kWarpBytes;
  const auto load = [&](int step, int stage) {
    if (step < steps) {
      weights.copy(step, my_codes + stage * kWarpBytes);
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
  float sums[Shape::kTiles][Shape::kTokens / 8][4] = {};
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
      multiply_step<Codes, T, Shape>(shared + stage * kXBytes, my_codes + stage * kWarpBytes, scales[stage], tile.rows,
                                     sums);
      if (step + kStages < steps) weights.read_scales(step + kStages, scales[stage]);
    }
  }
  // The sums go where the ring was
  wait_groups<0>();
  __syncthreads();
  constexpr int kSums = Shape::kTokens * sum_stride<Shape>;
  static_assert(kSums * int(sizeof(float)) <= kStages * kWarpBytes + kStages * kXBytes / kMmaWarps);
  store_sums<Shape>(p, tile, first, sums, reinterpret_cast<float*>(shared) + warp_id() * kSums);
}

}  // namespace moert::cuda
