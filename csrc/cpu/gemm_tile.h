// The product of one tile.  Included by one translation unit per instruction set.
//
// A block of A is widened to values as it lies, [M, K] or [K, M]; panels of B become [K, 2 vectors].  The micro kernel
// keeps kRows x 2 vectors of C in registers and broadcasts A.  Few rows over weights that lie along K skip the panels:
// each weight row is read once, in dot products with all the rows.
#pragma once

#include <utility>

#include "cpu/gemm_epilogue.h"

namespace moert::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kRows = 14;  // 28 accumulators + 2 of B of 32 registers
#else
constexpr int kRows = 6;  // 12 + 2 of 16
#endif

// From this many rows on, packing B pays.  Dot products take longer K blocks: the lanes are summed once a block.
constexpr int64_t kDotRows = 16;
constexpr int64_t kDotK = 2048;
constexpr int64_t kDotPitch = kDotK + 16;
static_assert(kDotRows * kDotPitch <= kGemmScratch);

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

// Exchange the off-diagonal blocks of `width` lanes between a and b: one step of a transposition.
template <int width, typename V, size_t... I>
MOERT_INLINE void exchange(V& a, V& b, std::index_sequence<I...>) {
  constexpr int n = int(sizeof...(I));
#if defined(__clang__)
  const V low = __builtin_shufflevector(a, b, (int(I) & width ? int(I) - width + n : int(I))...);
  const V high = __builtin_shufflevector(a, b, (int(I) & width ? int(I) + n : int(I) + width)...);
#else
  using Index = std::conditional_t<sizeof(a[0]) == 8, int64_t, int32_t>;
  typedef Index Mask __attribute__((vector_size(kVectorBytes)));
  const V low = __builtin_shuffle(a, b, Mask{(int(I) & width ? int(I) - width + n : int(I))...});
  const V high = __builtin_shuffle(a, b, Mask{(int(I) & width ? int(I) + n : int(I) + width)...});
#endif
  a = low;
  b = high;
}

template <int width, typename A>
MOERT_INLINE void transpose_step(Vec<A>* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<A>; ++i)
    if (!(i & width)) exchange<width>(rows[i], rows[i + width], std::make_index_sequence<kLanes<A>>{});
  if constexpr (width > 1) transpose_step<width / 2, A>(rows);
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
      for (int i = 0; i < L; ++i) rows[i] = half + i < N ? load(source(half + i) + k, count) : Vec<A>{};
      transpose_step<L / 2, A>(rows);
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
      store(panel, load(source));
      store(panel + kLanes<A>, load(source + kLanes<A>));
    } else {
      for (int64_t n = 0; n < kPanel<A>; ++n) panel[n] = n < N ? A(to_float(source[n * matrix.col_stride])) : A(0);
    }
  }
}

template <typename A>
void pack_panel(const GemmTile& t, int64_t n, int64_t k, int64_t N, int64_t K, A* panel) {
  with_dtype(t.b.dtype, [&](auto x) {
    using T = decltype(x);
    if constexpr (std::is_same_v<Acc<T>, A>) {
      const T* b = static_cast<const T*>(t.b.data);
      if (t.b_k_rows)
        pack_rows<T>(b + n * t.b.col_stride, t.b, k, N, K, panel);
      else
        pack_transposed<T>(b + k * t.b.col_stride, t.b, n, N, K, panel);
    }
  });
}

// The block of A from k on, as values, rows `pitch` apart: [M, K], or [K, M].
template <typename A>
void widen_block(const GemmTile& t, int64_t k, int64_t K, A* block, int64_t pitch) {
  TileMatrix a = t.a;
  const int64_t skip = (t.a_k_rows ? (a.index ? 0 : k * a.row_stride) : k * a.col_stride) * size_of(a.dtype);
  a.data = static_cast<const char*>(a.data) + skip;
  if (t.a_k_rows) {
    if (a.index) a.index += k;
    widen(a, K, t.M, block, pitch);
  } else {
    widen(a, t.M, K, block, pitch);
  }
}

// Dot products of M rows of values with N weight rows of type T, both along K.
template <typename T, int M, int N>
MOERT_INLINE void dot_block(const Acc<T>* a, const T* const* b, int64_t K, Acc<T>* c, bool accumulate) {
  using A = Acc<T>;
  Vec<A> acc[M][N] = {};
  for_vectors<A>(K, [&](int64_t k, auto count) {
    Vec<A> w[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) w[n] = load(b[n] + k, count);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const Vec<A> x = load(a + m * kDotPitch + k, count);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[m][n] += x * w[n];
    }
  });
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) {
      A* y = c + m * kTileColumns + n;
      *y = (accumulate ? *y : A(0)) + sum_lanes(acc[m][n]);
    }
}

template <typename T, int N>
void dot_rows_block(const GemmTile& t, const Acc<T>* a, const T* const* b, int64_t K, Acc<T>* c, bool accumulate) {
  for (int64_t m = 0; m < t.M; m += 4) {
    const Acc<T>* x = a + m * kDotPitch;
    Acc<T>* y = c + m * kTileColumns;
    switch (t.M - m) {
      case 1:
        dot_block<T, 1, N>(x, b, K, y, accumulate);
        break;
      case 2:
        dot_block<T, 2, N>(x, b, K, y, accumulate);
        break;
      case 3:
        dot_block<T, 3, N>(x, b, K, y, accumulate);
        break;
      default:
        dot_block<T, 4, N>(x, b, K, y, accumulate);
    }
  }
}

template <typename T>
void gemm_dots(const GemmTile& t) {
  using A = Acc<T>;
  A *block = static_cast<A*>(t.scratch), *c = static_cast<A*>(t.c);
  for (int64_t k = 0; k < t.K || k == 0; k += kDotK) {
    const int64_t K = t.K - k < kDotK ? t.K - k : kDotK;
    const bool accumulate = t.accumulate || k > 0;
    widen_block<A>(t, k, K, block, kDotPitch);
    const auto source = [&](int64_t n) {
      return static_cast<const T*>(t.b.data) + (t.b.index ? t.b.index[n] : n) * t.b.row_stride + k;
    };
    int64_t n = 0;
    for (; n + 4 <= t.N; n += 4) {
      const T* const rows[4] = {source(n), source(n + 1), source(n + 2), source(n + 3)};
      dot_rows_block<T, 4>(t, block, rows, K, c + n, accumulate);
    }
    for (; n < t.N; ++n) {
      const T* const row = source(n);
      dot_rows_block<T, 1>(t, block, &row, K, c + n, accumulate);
    }
  }
}

template <typename A>
void gemm_panels(const GemmTile& t) {
  constexpr auto rows = std::make_integer_sequence<int, kRows>{};
  A *block = static_cast<A*>(t.scratch), *panel = block + kTileBlock, *c = static_cast<A*>(t.c);
  for (int64_t k = 0; k < t.K || k == 0; k += kTileK) {
    const int64_t K = t.K - k < kTileK ? t.K - k : kTileK;
    const bool accumulate = t.accumulate || k > 0;
    widen_block<A>(t, k, K, block, t.a_k_rows ? kPitchKM : kPitchMK);
    for (int64_t n = 0; n < t.N; n += kPanel<A>) {
      pack_panel<A>(t, n, k, t.N - n < kPanel<A> ? t.N - n : kPanel<A>, K, panel);
      for (int64_t m = 0; m < t.M; m += kRows) {
        const int64_t M = t.M - m < kRows ? t.M - m : kRows;
        A* y = c + m * kTileColumns + n;
        if (t.a_k_rows)
          micro_kernel_of<A, true>(M, rows)(K, block + m, panel, y, accumulate);
        else
          micro_kernel_of<A, false>(M, rows)(K, block + m * kPitchMK, panel, y, accumulate);
      }
    }
  }
}

void gemm(const GemmTile& t) {
  const bool along_k = !t.a_k_rows && !t.b_k_rows && t.b.col_stride == 1;
  if (along_k && t.M < kDotRows)
    with_dtype(t.b.dtype, [&](auto x) { gemm_dots<decltype(x)>(t); });
  else if (t.b.dtype == DType::f64)
    gemm_panels<double>(t);
  else
    gemm_panels<float>(t);
}

}  // namespace
}  // namespace moert::cpu
