// Grouped GEMM on plain arithmetic units: any dtype, size and strides.  What the tensor cores cannot take falls back to
// it, and float64 and exact float32 have nothing else.
//
// A block of 256 threads computes a tile of 64 x 64, each thread 4 x 4 of it, over slices of 16.
#pragma once

#include "cuda/activation_backward.h"
#include "cuda/expert_tiles.h"
#include "cuda/grouped_gemm_product.h"
#include "cuda/simt.h"

namespace moert::cuda {

constexpr int kSimtTile = 64, kSimtSlice = 16, kSimtThreads = 256, kPerThread = 4;

// c[i][j] = sum over k < K of a(ty + 16 i, k) b(tx + 16 j, k), in order of k; a and b give zero outside.
template <typename A, typename OperandA, typename OperandB>
MOERT_DEVICE_INLINE void multiply_simt(const OperandA& a, const OperandB& b, int64_t K, bool a_by_rows, bool b_by_rows,
                                       A (&c)[kPerThread][kPerThread]) {
  constexpr int kRows = kSimtTile / kPerThread;
  __shared__ A a_slice[kSimtSlice][kSimtTile + 1], b_slice[kSimtSlice][kSimtTile + 1];
  const int tx = int(threadIdx.x) % kRows, ty = int(threadIdx.x) / kRows;
  for (int i = 0; i < kPerThread; ++i)
    for (int j = 0; j < kPerThread; ++j) c[i][j] = 0;

  for (int64_t k0 = 0; k0 < K; k0 += kSimtSlice) {
    // Load, neighbouring threads along what lies side by side
    for (int i = int(threadIdx.x); i < kSimtTile * kSimtSlice; i += kSimtThreads) {
      const int ka = a_by_rows ? i % kSimtSlice : i / kSimtTile, m = a_by_rows ? i / kSimtSlice : i % kSimtTile;
      const int kb = b_by_rows ? i % kSimtSlice : i / kSimtTile, n = b_by_rows ? i / kSimtSlice : i % kSimtTile;
      a_slice[ka][m] = k0 + ka < K ? a(m, k0 + ka) : A(0);
      b_slice[kb][n] = k0 + kb < K ? b(n, k0 + kb) : A(0);
    }
    __syncthreads();

    // Multiply
#pragma unroll
    for (int k = 0; k < kSimtSlice; ++k) {
      A a_now[kPerThread], b_now[kPerThread];
      for (int i = 0; i < kPerThread; ++i) a_now[i] = a_slice[k][ty + i * kRows];
      for (int j = 0; j < kPerThread; ++j) b_now[j] = b_slice[k][tx + j * kRows];
      for (int i = 0; i < kPerThread; ++i)
        for (int j = 0; j < kPerThread; ++j) c[i][j] += a_now[i] * b_now[j];
    }
    __syncthreads();
  }
}

// f(i, j, row, column) for each element of the thread's part of a tile.
template <typename F>
MOERT_DEVICE_INLINE void for_thread_tile(const F& f) {
  constexpr int kRows = kSimtTile / kPerThread;
  const int tx = int(threadIdx.x) % kRows, ty = int(threadIdx.x) / kRows;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i)
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) f(i, j, ty + i * kRows, tx + j * kRows);
}

template <typename T, class To>
__global__ void __launch_bounds__(kSimtThreads) grouped_gemm_simt(Product<T, To> p) {
  using A = Acc<T>;
  const int64_t columns = (p.N + kSimtTile - 1) / kSimtTile;
  const TileIndex tile = banded(blockIdx.x, num_row_tiles(p.S, p.E, kSimtTile), columns, kBand);
  const RowTile rows = row_tile(p.offsets, p.E, p.S, kSimtTile, int32_t(tile.row));
  if (rows.rows == 0) return;
  const int64_t n0 = tile.column * kSimtTile;
  const bool unused = rows.expert == p.E;

  A gate[kPerThread][kPerThread], up[kPerThread][kPerThread];
  const auto x = [&](int m, int64_t k) {
    const T* row = m < rows.rows ? p.x.row(rows.row + m) : nullptr;
    return row ? A(widen(row[k])) : A(0);
  };
  const auto times = [&](const MatrixOf<const T>& w, A(&c)[kPerThread][kPerThread]) {
    const auto weight = [&](int n, int64_t k) { return n0 + n < p.N ? A(widen(*w.at(rows.expert, n0 + n, k))) : A(0); };
    multiply_simt<A>(x, weight, p.K, true, w.column == 1, c);
  };
  if (!unused) {
    times(p.w, gate);
    if (p.epilogue.takes_up()) times(p.up, up);
  }
  A row_sums[kPerThread] = {};
  for_thread_tile([&](int i, int j, int row, int column) {
    if (row >= rows.rows || n0 + column >= p.N) return;
    if (unused) return p.epilogue.clear(rows.row + row, n0 + column);
    const auto store = [&] {
      return p.epilogue.template store<1>(rows.expert, rows.row + row, n0 + column, {gate[i][j]},
                                          {p.epilogue.takes_up() ? up[i][j] : A(0)});
    };
    if constexpr (To::kSumsRows)
      row_sums[i] += store();
    else
      store();
  });
  if constexpr (To::kSumsRows) {
    static_assert(kSimtTile == kDotColumns);
    if (unused) return;
    for_thread_tile([&](int i, int j, int row, int column) {
      if (j > 0) return;
      const A sum = warp_sum<kSimtTile / kPerThread>(row_sums[i]);
      if (column == 0 && row < rows.rows) p.epilogue.put_sum(rows.row + row, n0, sum);
    });
  }
}

template <typename T>
__global__ void __launch_bounds__(kSimtThreads) grouped_gemm_wgrad_simt(Gradient<T> p) {
  using A = Acc<T>;
  const int64_t rows = (p.N + kSimtTile - 1) / kSimtTile, columns = (p.K + kSimtTile - 1) / kSimtTile;
  const int64_t e = blockIdx.x / (rows * columns);
  const TileIndex tile = banded(blockIdx.x % (rows * columns), rows, columns, kBand);
  const int64_t n0 = tile.row * kSimtTile, k0 = tile.column * kSimtTile;
  const Slots slots = slots_of(p.offsets, e, p.S);
  if (p.onto && slots.count == 0) return;

  A c[kPerThread][kPerThread];
  const auto value = [&](const RowsOf<T>& from, int64_t s, int64_t column, int64_t size) {
    const T* row = column < size ? from.row(slots.begin + s) : nullptr;
    return row ? A(widen(row[column])) : A(0);
  };
  const auto dy = [&](int n, int64_t s) { return value(p.dy, s, n0 + n, p.N); };
  const auto x = [&](int k, int64_t s) { return value(p.x, s, k0 + k, p.K); };
  multiply_simt<A>(dy, x, slots.count, false, false, c);

  for_thread_tile([&](int i, int j, int row, int column) {
    if (n0 + row < p.N && k0 + column < p.K) p.template store<1>(e, n0 + row, k0 + column, {c[i][j]});
  });
}

}  // namespace moert::cuda
