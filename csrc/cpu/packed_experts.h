// Tiles of packed weights for the drivers: as products with int8 rows, and as floats for the kernels of fused_experts.
#pragma once

#include "cpu/packed_gemm_isa.h"
#include "cpu/tile_tasks.h"

namespace moert::cpu {

// The rows of expert e from `row` on.
inline PackedRows rows_of(const PackedMatrix& w, int64_t e, int64_t row) {
  const Packing& p = w.packing;
  const int64_t first = e * p.rows + row, per_row = groups(p);
  return {p, w.codes + first * row_bytes(p),
          static_cast<const char*>(w.scales) + first * per_row * scale_bytes(p.format),
          w.zeros ? w.zeros + first * per_row : nullptr};
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

// c [M, N], rows kTileColumns apart = x [M, columns] . w[e, n .. n + N]^T with full activations.
template <typename A>
void full_product(const PackedMatrix& w, const TileTask& task, int64_t row, const TileOperand& x, A* c, A* scratch) {
  const int64_t K = w.packing.columns;
  const int64_t rows = std::clamp<int64_t>(kDequantizedValues / std::max<int64_t>(K, 1) / 4 * 4, 4, task.N + 3);
  // The doubles first: behind an odd number of floats they would not be aligned.
  A* values = reinterpret_cast<A*>(thread_scratch(rows * K * int64_t(sizeof(float) + sizeof(A))));
  float* floats = reinterpret_cast<float*>(values + (sizeof(A) == 8 ? rows * K : 0));
  for (int64_t n = 0; n < task.N; n += rows) {
    const int64_t N = std::min(rows, task.N - n);
    packed_gemm_kernels().dequantize(rows_of(w, task.expert, row + n), N, floats, K);
    if constexpr (sizeof(A) == 8) std::copy(floats, floats + N * K, values);
    const TileOperand b{{values, DTypeOf<A>::value, K, 1, nullptr}, false};
    gemm_kernels().gemm({task.M, N, K, x, b, c + n, scratch});
  }
}

}  // namespace moert::cpu
