// Tiles of packed weights for the drivers: as products with int8 rows, and as floats for the kernels of fused_experts.
#pragma once

#include "cpu/packed_gemm_isa.h"
#include "cpu/tile_tasks.h"
#include "moert/fp8.h"

namespace moert::cpu {

// The rows of expert e from `row` on.
inline PackedRows rows_of(const PackedMatrix& w, int64_t e, int64_t row) {
  const Packing& p = w.packing;
  const int64_t first = e * p.rows + row, per_row = groups(p);
  const char* scales = static_cast<const char*>(w.scales);
  switch (p.format) {
    case Format::fp8:
      return {p, w.codes + first * row_bytes(p), scales + e * fp8_blocks(p.rows) * per_row * 4, nullptr, row};
    case Format::bit_nested:
      return {p, w.codes + e * w.codes_stride + row * row_bytes(p), scales + first * per_row * 2, nullptr};
    case Format::sub1:
      return {p,   w.codes + 2 * w.starts[e],    scales + first * 4, w.zeros + 4 * (first + e),
              row, w.starts[e + 1] - w.starts[e]};
    default:
      return {p, w.codes + first * row_bytes(p), scales + first * per_row * scale_bytes(p.format),
              w.zeros ? w.zeros + first * per_row : nullptr};
  }
}

// Of this thread, at least so large; what it held is lost.
inline char* thread_scratch(int64_t bytes) {
  static thread_local Memory<char> memory;
  static thread_local int64_t size = 0;
  if (size < bytes) memory = allocate<char>(bytes), size = bytes;
  return memory.get();
}

// Dequantized rows that stay in the level-2 cache while they are multiplied.
constexpr int64_t kDequantizedValues = 64 << 10;

// Of a tile's columns, so many are dequantized and multiplied at once: whole panels of every instruction set, for
// gemm() stores whole ones, and what lies behind the last column of a row of the tile is the next row.  Where rows are
// so long that 32 leave the level-2 cache, fewer at once were still slower (fp8, 14336 columns: 1.2 to 2.7 times).
inline int64_t rows_at_once(int64_t fit) { return std::clamp<int64_t>(fit / 32 * 32, 32, kTileColumns); }

// As full_product, for few rows; false where the format has no kernel for them.
inline bool few_product(const PackedMatrix& w, const TileTask& task, int64_t row, const TileOperand& x, float* c) {
  const int64_t K = w.packing.columns, stride = (K + 15) / 16 * 16 + kFewPadding;
  const int64_t bytes = task.M * stride * int64_t(sizeof(float));
  char* scratch = thread_scratch(bytes + few_scratch(K));
  float* values = reinterpret_cast<float*>(scratch);
  gemm_kernels().widen(x.matrix, task.M, K, values, stride);
  for (int64_t m = 0; m < task.M; ++m) std::fill(values + m * stride + K, values + (m + 1) * stride, 0.0f);
  return packed_gemm_kernels().few({task.M, task.N, values, stride, rows_of(w, task.expert, row + task.n), c,
                                    reinterpret_cast<uint8_t*>(scratch + bytes)});
}

// c [M, N], rows kTileColumns apart = x [M, columns] . w[e, row + n .. ]^T with full activations; n and N are the
// task's.
template <typename A>
void full_product(const PackedMatrix& w, const TileTask& task, int64_t row, const TileOperand& x, bool batch_invariant,
                  A* c, A* scratch) {
  if constexpr (sizeof(A) == 4)
    if (task.M <= kFewRows && !batch_invariant && few_product(w, task, row, x, c)) return;
  const int64_t K = w.packing.columns;
  const int64_t rows = rows_at_once(kDequantizedValues / std::max<int64_t>(K, 1));
  // The doubles first: behind an odd number of floats they would not be aligned.
  A* values = reinterpret_cast<A*>(thread_scratch(rows * K * int64_t(sizeof(float) + sizeof(A))));
  float* floats = reinterpret_cast<float*>(values + (sizeof(A) == 8 ? rows * K : 0));
  for (int64_t n = 0; n < task.N; n += rows) {
    const int64_t N = std::min(rows, task.N - n);
    packed_gemm_kernels().dequantize(rows_of(w, task.expert, row + task.n + n), N, floats, K);
    if constexpr (sizeof(A) == 8) std::copy(floats, floats + N * K, values);
    const TileOperand b{{values, DTypeOf<A>::value, K, 1, nullptr}, false};
    GemmTile tile{task.M, N, K, x, b, c + n, scratch};
    tile.batch_invariant = batch_invariant;
    gemm_kernels().gemm(tile);
  }
}

// Weights of bfloat16 that are multiplied at a time: half of a level-2 cache of 2 MB.
constexpr int64_t kBf16Values = 512 << 10;

// c0 [M, N], rows kTileColumns apart = x [M, columns] . w[e, n .. ]^T and, unless c1 is null, c1 = x . w[e, up + n ..
// ]^T, the weights rounded to bfloat16 as x is; n and N are the task's, same_x its number of GemmTile::same_a.
inline void bf16_product(const PackedMatrix& w, const TileTask& task, int64_t up, const TileOperand& x, int64_t same_x,
                         bool batch_invariant, float* c0, float* c1, float* scratch) {
  const int64_t K = w.packing.columns, halves = c1 ? 2 : 1;
  // One step more, so that rows start on different cache sets.
  const int64_t stride = (K + kBf16Step - 1) / kBf16Step * kBf16Step + kBf16Step;
  // Where x does not fit at once, it is laid out again for every product: then of all weights of the tile.
  const bool fits = task.M * K <= kTileRows * kPairK;
  const int64_t rows = fits ? rows_at_once(kBf16Values / halves / stride) : kTileColumns / halves;
  bf16* values = reinterpret_cast<bf16*>(
      thread_scratch(halves * rows * stride * int64_t(sizeof(bf16)) + K * int64_t(sizeof(float))));
  bf16* second = values + rows * stride;
  float* row = reinterpret_cast<float*>(values + halves * rows * stride);
  for (int64_t n = 0; n < task.N; n += rows) {
    const int64_t N = std::min(rows, task.N - n);
    const auto operand = [&](int64_t first, bf16* to) -> TileOperand {
      packed_gemm_kernels().dequantize_bf16(rows_of(w, task.expert, first + task.n + n), N, to, stride, row);
      return {{to, DType::bf16, stride, 1, nullptr}, false};
    };
    GemmTile tile{task.M, N, K, x, operand(0, values), c0 + n, scratch};
    if (c1) tile.b2 = operand(up, second), tile.c2 = c1 + n;
    tile.batch_invariant = batch_invariant;
    tile.same_a = same_x;
    gemm_kernels().gemm(tile);
  }
}

}  // namespace moert::cpu
