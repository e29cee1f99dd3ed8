// Products of many rows: a block of A is widened to values as it lies, [M, K] or [K, M]; panels of B become
// [K, 2 vectors].  The micro kernel keeps kRows x 2 vectors of C in registers and broadcasts A.
#pragma once

#include "cpu/gemm_epilogue.h"

namespace moert::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kRows = 14;  // 28 accumulators + 2 of B of 32 registers
#else
constexpr int kRows = 6;  // 12 + 2 of 16
#endif

template <typename A>
constexpr int kPanel = 2 * kLanes<A>;

// c[m, 0..kPanel) (+)= sum over k of a[m, k] * b[k]; a is a block of A; b is [K, kPanel].
template <typename A, int M, bool kARows>
void micro_kernel(int64_t K, const A* a, const A* b, A* c, bool accumulate) {
  Vec<A> acc[M][2];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    acc[m][0] = accumulate ? load(c + m * kTileColumns) : Vec<A>{};
    acc[m][1] = accumulate ? load(c + m * kTileColumns + kLanes<A>) : Vec<A>{};
  }
  for (int64_t k = 0; k < K; ++k) {
    const Vec<A> b0 = load(b + k * kPanel<A>), b1 = load(b + k * kPanel<A> + kLanes<A>);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const Vec<A> x = splat(kARows ? a[k * kPitchKM + m] : a[m * kPitchMK + k]);
      acc[m][0] += x * b0;
      acc[m][1] += x * b1;
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    store(c + m * kTileColumns, acc[m][0]);
    store(c + m * kTileColumns + kLanes<A>, acc[m][1]);
  }
}

template <typename A>
using MicroKernel = void (*)(int64_t, const A*, const A*, A*, bool);

template <typename A, bool kARows, int... M>
MicroKernel<A> micro_kernel_of(int64_t m, std::integer_sequence<int, M...>) {
  static constexpr MicroKernel<A> table[] = {micro_kernel<A, M + 1, kARows>...};
  return table[m - 1];
}

// panel[k, n] = b(n, k) for n < N <= kPanel, k < K; b's rows run along K; columns from N on are zero.
template <typename T>
void pack_transposed(const T* b, const TileMatrix& matrix, int64_t row, int64_t N, int64_t K, Acc<T>* panel) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const auto source = [&](int64_t n) {
    return b + (matrix.index ? matrix.index[row + n] : row + n) * matrix.row_stride;
  };
  if (matrix.col_stride != 1) {
    for (int64_t n = 0; n < kPanel<A>; ++n)
      for (int64_t k = 0; k < K; ++k)
        panel[k * kPanel<A> + n] = n < N ? A(to_float(source(n)[k * matrix.col_stride])) : A(0);
    return;
  }
  for (int64_t half = 0; half < kPanel<A>; half += L) {
    for_vectors<A>(K, [&](int64_t k, auto count) {
      Vec<A> rows[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) {
        rows[i] = half + i < N ? load(source(half + i) + k, count) : Vec<A>{};
        // The next panel's rows: too many streams for the CPU to foresee.
        if (half + i < N) __builtin_prefetch(source(half + i) + kPanel<A> * matrix.row_stride + k, 0, 2);
      }
      transpose<L / 2>(rows);
      for (int64_t i = 0; i < count; ++i) store(panel + (k + i) * kPanel<A> + half, rows[i]);
    });
  }
}

// panel[k, n] = b(k, n) for n < N <= kPanel; b's rows run along N.
template <typename T>
void pack_rows(const T* b, const TileMatrix& matrix, int64_t row, int64_t N, int64_t K, Acc<T>* panel) {
  using A = Acc<T>;
  for (int64_t k = 0; k < K; ++k, panel += kPanel<A>) {
    const T* source = b + (matrix.index ? matrix.index[row + k] : row + k) * matrix.row_stride;
    if (N == kPanel<A> && matrix.col_stride == 1) {
      __builtin_prefetch(source + kPanel<A>, 0, 2);  // the next panel; rows lie too far apart for the CPU to foresee it
      __builtin_prefetch(source + 2 * kPanel<A> - 1, 0, 2);
      store(panel, load(source));
      store(panel + kLanes<A>, load(source + kLanes<A>));
    } else {
      for (int64_t n = 0; n < kPanel<A>; ++n) panel[n] = n < N ? A(to_float(source[n * matrix.col_stride])) : A(0);
    }
  }
}

template <typename A>
void pack_panel(const TileOperand& operand, int64_t n, int64_t k, int64_t N, int64_t K, A* panel) {
  with_dtype(operand.matrix.dtype, [&](auto x) {
    using T = decltype(x);
    if constexpr (std::is_same_v<Acc<T>, A>) {
      const T* b = static_cast<const T*>(operand.matrix.data);
      if (operand.k_rows)
        pack_rows<T>(b + n * operand.matrix.col_stride, operand.matrix, k, N, K, panel);
      else
        pack_transposed<T>(b + k * operand.matrix.col_stride, operand.matrix, n, N, K, panel);
    }
  });
}

// The block of A from k on, as values, rows `pitch` apart: [M, K], or [K, M].
template <typename A>
void widen_block(const GemmTile& t, int64_t k, int64_t K, A* block, int64_t pitch) {
  TileMatrix a = t.a.matrix;
  const bool k_rows = t.a.k_rows;
  const int64_t skip = (k_rows ? (a.index ? 0 : k * a.row_stride) : k * a.col_stride) * size_of(a.dtype);
  a.data = static_cast<const char*>(a.data) + skip;
  if (k_rows && a.index) a.index += k;
  widen(a, k_rows ? K : t.M, k_rows ? t.M : K, block, pitch);
}

// The part of the tile's output that begins at (m, n).
template <typename A>
void finish_part(const StoreTile& whole, int64_t m, int64_t n, int64_t M, int64_t N) {
  StoreTile part = whole;
  part.M = M;
  part.N = N;
  part.c = static_cast<const A*>(whole.c) + m * kTileColumns + n;
  if (whole.bias) part.bias = static_cast<const A*>(whole.bias) + n;
  if (whole.scale) part.scale = static_cast<const A*>(whole.scale) + m;
  part.out = static_cast<char*>(whole.out) + (m * whole.row_stride + n * whole.col_stride) * size_of(whole.dtype);
  store_tile(part);
}

// All columns of one K block.
template <typename A, bool kARows>
void multiply_panels(const GemmTile& t, const TileOperand& b, const A* block, int64_t k, int64_t K, A* panel, A* c,
                     bool accumulate) {
  const StoreTile* finish = k + K >= t.K && c == t.c ? t.finish : nullptr;
  constexpr auto rows = std::make_integer_sequence<int, kRows>{};
  for (int64_t n = 0; n < t.N; n += kPanel<A>) {
    const int64_t N = t.N - n < kPanel<A> ? t.N - n : kPanel<A>;
    pack_panel<A>(b, n, k, N, K, panel);
    // Slabs of equal height: a last one of two rows would wait for its sums, not for the multipliers.
    const int64_t slabs = (t.M + kRows - 1) / kRows;
    for (int64_t i = 0, m = 0, M; i < slabs; ++i, m += M) {
      M = (t.M - m + slabs - i - 1) / (slabs - i);
      micro_kernel_of<A, kARows>(M, rows)(K, block + (kARows ? m : m * kPitchMK), panel, c + m * kTileColumns + n,
                                          accumulate);
      if (finish) finish_part<A>(*finish, m, n, M, N);
    }
  }
}

template <typename A>
void gemm_panels(const GemmTile& t) {
  A *block = static_cast<A*>(t.scratch), *panel = block + kTileBlock;
  const auto multiply = t.a.k_rows ? multiply_panels<A, true> : multiply_panels<A, false>;
  for (int64_t k = 0; k < t.K || k == 0; k += kTileK) {
    const int64_t K = t.K - k < kTileK ? t.K - k : kTileK;
    widen_block<A>(t, k, K, block, t.a.k_rows ? kPitchKM : kPitchMK);
    multiply(t, t.b, block, k, K, panel, static_cast<A*>(t.c), t.accumulate || k > 0);
    if (t.c2) multiply(t, t.b2, block, k, K, panel, static_cast<A*>(t.c2), t.accumulate || k > 0);
  }
}

}  // namespace
}  // namespace moert::cpu
