// Products of many rows: a block of A is laid out as it lies, [M, K] or [K, M]; panels of B become [K, 2 vectors].  The
// micro kernel keeps kRows x 2 vectors of C in registers and broadcasts A.  E is what the operands are laid out as:
// values, or pairs of bfloat16, of which one row along K holds two.
#pragma once

#include "cpu/ahead.h"
#include "cpu/gemm_pairs.h"

namespace moert::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kRows = 14;  // 28 accumulators + 2 of B of 32 registers
#else
constexpr int kRows = 6;  // 12 + 2 of 16
#endif

constexpr int64_t kPanelBytes = 2 * kVectorBytes;

template <typename E>
constexpr int kPanel = 2 * kLanes<E>;
template <typename E>
constexpr int64_t kPanelK = kDepth<E> * kTileK;

// Up to so many rows widen panels as they read them; kernels for more, and for vectors of 16 bytes, are not worth the
// time that they take to compile.
constexpr int kWidenedRows = kVectorBytes > 16 ? 4 : 0;

constexpr int64_t kStepsAhead = 32;  // along K, 4 KB of AVX-512 panels of float32

// c[m, 0..kPanel) (+)= sum over k of a[m, k] * b[k]; a is a block of A; b is [K, kPanel], widened as it is read where T
// is not E.  Fetched meanwhile: what `next` says, or if that is nothing and b streams from memory what follows there.
template <typename E, typename T, int M, bool kARows>
void micro_kernel(int64_t K, const E* a, const T* b, Acc<E>* c, bool accumulate, bool streams, Ahead& next) {
  Ahead ahead = next;  // in registers
  const bool spread = ahead.at_once > 0;
  using A = Acc<E>;
  Vec<A> acc[M][2];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    acc[m][0] = accumulate ? load(c + m * kTileColumns) : Vec<A>{};
    acc[m][1] = accumulate ? load(c + m * kTileColumns + kLanes<A>) : Vec<A>{};
  }
  for (int64_t k = 0; k < K; ++k) {
    const Vec<E> b0 = load(b + k * kPanel<E>), b1 = load(b + k * kPanel<E> + kLanes<E>);
    if (spread) {
      ahead.fetch();
    } else if (streams) {
      __builtin_prefetch(b + (k + kStepsAhead) * kPanel<E>, 0, 2);
      if constexpr (sizeof(T) == sizeof(E)) __builtin_prefetch(b + (k + kStepsAhead) * kPanel<E> + kLanes<E>, 0, 2);
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const Vec<E> x = splat(kARows ? a[k * kPitchKM + m] : a[m * kPitchMK + k]);
      acc[m][0] = multiply_add(acc[m][0], x, b0);
      acc[m][1] = multiply_add(acc[m][1], x, b1);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    store(c + m * kTileColumns, acc[m][0]);
    store(c + m * kTileColumns + kLanes<A>, acc[m][1]);
  }
  next = ahead;
}

template <typename E, typename T>
using MicroKernel = void (*)(int64_t, const E*, const T*, Acc<E>*, bool, bool, Ahead&);

template <typename E, typename T, bool kARows, int... M>
MicroKernel<E, T> micro_kernel_of(int64_t m, std::integer_sequence<int, M...>) {
  static constexpr MicroKernel<E, T> table[] = {micro_kernel<E, T, M + 1, kARows>...};
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
      for (int i = 0; i < L; ++i) rows[i] = half + i < N ? load(source(half + i) + k, count) : Vec<A>{};
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

// The panel of B whose first element is (n, k), N by K.
void pack_panel(const TileOperand& operand, int64_t n, int64_t k, int64_t N, int64_t K, Pair* panel) {
  TileMatrix b = operand.matrix;
  b.data = static_cast<const bf16*>(b.data) + (operand.k_rows ? n : k) * b.col_stride;
  if (operand.k_rows)
    interleave_rows(b, k, K, N, kPanel<Pair>, panel, kPanel<Pair>);
  else
    transpose_pairs<kPanel<Pair>>(b, n, N, K, panel);
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

// Where the panel of columns from n on lies, of weights that lie in panels of T.
template <typename E, typename T>
const T* lying_panel(const TileOperand& operand, int64_t n, int64_t k) {
  return static_cast<const T*>(operand.matrix.data) + n * operand.matrix.row_stride + k * kPanel<E>;
}

// Pairs of bfloat16, [K / 2, kPanel].
const Pair* lying_pairs(const TileOperand& operand, int64_t n, int64_t k) {
  return reinterpret_cast<const Pair*>(lying_panel<Pair, bf16>(operand, n, k));
}

// The block of A from k on, rows `pitch` apart: [M, K], or [K, M].
template <typename E>
void lay_out_block(const GemmTile& t, int64_t k, int64_t K, E* block, int64_t pitch) {
  TileMatrix a = t.a.matrix;
  const bool k_rows = t.a.k_rows;
  const int64_t skip = (k_rows ? (a.index ? 0 : k * a.row_stride) : k * a.col_stride) * size_of(a.dtype);
  a.data = static_cast<const char*>(a.data) + skip;
  if (k_rows && a.index) a.index += k;
  if constexpr (!std::is_same_v<E, Pair>)
    widen(a, k_rows ? K : t.M, k_rows ? t.M : K, block, pitch);
  else if (k_rows)
    interleave_rows(a, 0, K, t.M, t.M, block, pitch);
  else
    copy_pairs(a, t.M, K, 2, block, pitch);
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

// The panel (n, k) where it lies, over so many steps; nothing where packing fetches the next panel, or its rows are
// gathered.
template <typename E>
Ahead lines_of_panel(const GemmTile& t, const TileOperand& b, int64_t n, int64_t k, int64_t steps) {
  const TileMatrix& matrix = b.matrix;
  const int64_t size = size_of(matrix.dtype), pitch = matrix.row_stride * size;
  const int64_t N = t.N - n < kPanel<E> ? t.N - n : kPanel<E>, K = t.K - k < kPanelK<E> ? t.K - k : kPanelK<E>;
  const char* data = static_cast<const char*>(matrix.data);
  if (b.panels) return Ahead::over(steps, data + n * pitch + k * kPanel<E> * size, 0, K * kPanel<E> * size, 1);
  if (std::is_same_v<E, Pair> || b.k_rows || matrix.index || matrix.col_stride != 1) return {};
  return Ahead::over(steps, data + n * pitch + k * size, pitch, K * size, N);
}

// What is multiplied after the panel (n, k) of b.
template <typename E>
Ahead next_panel(const GemmTile& t, const TileOperand& b, int64_t n, int64_t k, int64_t steps) {
  if (n + kPanel<E> < t.N) return lines_of_panel<E>(t, b, n + kPanel<E>, k, steps);
  if (&b == &t.b && t.c2) return lines_of_panel<E>(t, t.b2, 0, k, steps);
  return k + kPanelK<E> < t.K ? lines_of_panel<E>(t, t.b, 0, k + kPanelK<E>, steps) : Ahead{};
}

// All columns of one K block.
template <typename E, bool kARows>
void multiply_panels(const GemmTile& t, const TileOperand& b, const E* block, int64_t k, int64_t K, E* panel, Acc<E>* c,
                     bool accumulate) {
  const StoreTile* finish = k + K >= t.K && c == t.c ? t.finish : nullptr;
  constexpr auto rows = std::make_integer_sequence<int, kRows>{};
  const int64_t depth = (K + kDepth<E> - 1) / kDepth<E>;
  // Slabs of equal height: a last one of two rows would wait for its sums, not for the multipliers.
  const int64_t slabs = (t.M + kRows - 1) / kRows;
  for (int64_t n = 0; n < t.N; n += kPanel<E>) {
    const int64_t N = t.N - n < kPanel<E> ? t.N - n : kPanel<E>;
    const auto multiply = [&](const auto* columns, bool streams, auto rows) {
      using T = std::remove_cv_t<std::remove_pointer_t<decltype(columns)>>;
      // One slab streams its panel where it lies; what several multiply again leaves time for the next.
      Ahead ahead = streams && slabs == 1 ? Ahead{} : next_panel<E>(t, b, n, k, slabs * depth);
      for (int64_t i = 0, m = 0, M; i < slabs; ++i, m += M) {
        M = (t.M - m + slabs - i - 1) / (slabs - i);
        micro_kernel_of<E, T, kARows>(M, rows)(depth, block + (kARows ? m : m * kPitchMK), columns,
                                               c + m * kTileColumns + n, accumulate, streams, ahead);
        if (finish) finish_part<Acc<E>>(*finish, m, n, M, N);
      }
    };
    if (!b.panels) {
      pack_panel(b, n, k, N, K, panel);
      multiply(panel, false, rows);
      continue;
    }
    if constexpr (std::is_same_v<E, Pair>) {
      multiply(lying_pairs(b, n, k), true, rows);
      continue;
    }
    with_dtype(b.matrix.dtype, [&](auto x) {
      using T = decltype(x);
      if constexpr (std::is_same_v<Acc<T>, E>) {
        const T* lying = lying_panel<E, T>(b, n, k);
        if constexpr (std::is_same_v<T, E>) {
          multiply(lying, true, rows);
        } else {
          if constexpr (!kARows && kWidenedRows > 0)
            if (t.M <= kWidenedRows) return multiply(lying, true, std::make_integer_sequence<int, kWidenedRows>{});
          for (int64_t i = 0; i < K * kPanel<E>; i += kLanes<E>) store(panel + i, load(lying + i));
          multiply(panel, false, rows);
        }
      }
    });
  }
}

template <typename E>
void gemm_panels(const GemmTile& t) {
  using A = Acc<E>;
  E *block = static_cast<E*>(t.scratch), *panel = block + kTileBlock;
  const auto multiply = t.a.k_rows ? multiply_panels<E, true> : multiply_panels<E, false>;
  for (int64_t k = 0; k < t.K || k == 0; k += kPanelK<E>) {
    const int64_t K = t.K - k < kPanelK<E> ? t.K - k : kPanelK<E>;
    lay_out_block<E>(t, k, K, block, t.a.k_rows ? kPitchKM : kPitchMK);
    multiply(t, t.b, block, k, K, panel, static_cast<A*>(t.c), t.accumulate || k > 0);
    if (t.c2) multiply(t, t.b2, block, k, K, panel, static_cast<A*>(t.c2), t.accumulate || k > 0);
  }
}

}  // namespace
}  // namespace moert::cpu
