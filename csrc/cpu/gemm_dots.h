// Products of few rows with weights that lie along K: no packing; each weight row is read once, in dot products with
// all the rows.  A register block is kDotM rows by kDotN weight rows.  E is what the rows of x are laid out as: values,
// or pairs where the weights are multiplied as they are.
//
// Per vector along K a block of 6 x 4 loads 10 vectors for 24 multiply-adds, so even the CPUs with one 512-bit load a
// cycle stay at their multiply-adds; the sums over lanes cost about 4 instructions a result, once in kDotK elements.
#pragma once

#include <algorithm>

#include "cpu/ahead.h"
#include "cpu/gemm_pairs.h"

namespace moert::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kDotN = 4;  // 24 accumulators, 4 of weights, 1 of x, 1 mask of 32 registers
#else
constexpr int kDotN = 2;  // 12 + 2 + 1 + 1 of 16
#endif
constexpr int kDotM = 6;

// The block of x stays in the L2 cache.
constexpr int64_t kDotPitch = kDotK + 16;
static_assert(kDotRows * kDotPitch <= kGemmScratch);

// One step along K: a vector of weights, which holds two vectors of values where they are bfloat16.
template <typename T>
constexpr int64_t kDotStep = (std::is_same_v<T, bf16> ? 2 : 1) * kLanes<Acc<T>>;

// A vector and no struct around it: GCC would copy that through the stack, in halves.
template <typename T>
using Raw = std::conditional_t<std::is_same_v<T, bf16>, Vec<Pair>, Vec<Acc<T>>>;

template <typename T>
MOERT_INLINE Raw<T> load_raw(const T* p) {
  if constexpr (std::is_same_v<T, bf16>) {
    Vec<Pair> pairs;
    std::memcpy(&pairs, p, sizeof pairs);
    return pairs;
  } else {
    return load(p);
  }
}

// Vector v of a step: pairs as they are; of bfloat16 the elements at even places, then those at odd ones, one
// instruction each.
template <typename E, typename T>
MOERT_INLINE Vec<E> operands(const Raw<T>& raw, int v) {
  if constexpr (std::is_same_v<T, bf16> && !std::is_same_v<E, Pair>)
    return bit_cast_vector<VecF>(v ? raw & 0xffff0000u : raw << 16);
  else
    return raw;
}

// Up to so many rows of x are multiplied by one weight row after the other, so that memory is read in its order; more
// are worth the loads of x that several weight rows share.
constexpr int kLinearRows = 2;

// Lines of memory are counted beside every step, which costs too much where a step is a quarter of a line.
constexpr bool kSpreads = kVectorBytes > 16;

// sums[m][n] = the products of M rows of x with N weight rows, lanes not yet added; K in whole steps.  What is fetched
// meanwhile: what `ahead` says, or if that is nothing the same column of rows that follow.
template <typename E, typename T, int M, int N>
MOERT_INLINE void dot_rows(const E* x, const T* b, int64_t b_stride, int64_t K, Vec<Acc<T>> (&sums)[M][N],
                           Ahead& ahead) {
  const bool spread = kSpreads && M > kLinearRows && ahead.at_once > 0;
  const int64_t beside = whole_blocks_ahead(N * b_stride * int64_t(sizeof(T))) / int64_t(sizeof(T));
  for (auto& row : sums)
    for (auto& sum : row) sum = Vec<Acc<T>>{};
  for (int64_t k = 0; k < K; k += kDotStep<T>) {
    Raw<T> w[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      w[n] = load_raw(b + n * b_stride + k);
      if (!spread) __builtin_prefetch(b + n * b_stride + k + beside, 0, 2);
    }
    if (spread) ahead.fetch();
#pragma GCC unroll 2
    for (int v = 0; v < kDotStep<T> / kDepth<E> / kLanes<E>; ++v) {
      Vec<E> y[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) y[n] = operands<E, T>(w[n], v);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const Vec<E> row = load(x + m * kDotPitch + k / kDepth<E> + v * kLanes<E>);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sums[m][n] = multiply_add(sums[m][n], row, y[n]);
      }
    }
  }
}

// c[m, n] (+)= dot products of M rows of x, as lay_out_rows leaves them, with N weight rows.
template <typename E, typename T, int M, int N>
MOERT_INLINE void dot_block(const E* x, const T* b, int64_t b_stride, int64_t K, Acc<T>* c, bool accumulate,
                            Ahead& ahead) {
  using A = Acc<T>;
  Vec<A> sums[M][N];
  if constexpr (M <= kLinearRows) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      Vec<A> column[M][1];
      dot_rows<E, T>(x, b + n * b_stride, b_stride, K, column, ahead);
      for (int m = 0; m < M; ++m) sums[m][n] = column[m][0];
    }
  } else {
    dot_rows<E, T>(x, b, b_stride, K, sums, ahead);
  }
  for (int m = 0; m < M; ++m) {
    A* y = c + m * kTileColumns;
    if constexpr (N == 4)
      add_lanes_of_four<A>(sums[m], y, accumulate);
    else
      for (int n = 0; n < N; ++n) y[n] = (accumulate ? y[n] : A(0)) + sum_lanes(sums[m][n]);
  }
}

template <typename E, typename T>
using DotBlock = void (*)(const E*, const T*, int64_t, int64_t, Acc<T>*, bool, Ahead&);

template <typename E, typename T, int M, int N>
void dot_block_of(const E* x, const T* b, int64_t b_stride, int64_t K, Acc<T>* c, bool accumulate, Ahead& ahead) {
  Ahead own = ahead;  // in registers
  dot_block<E, T, M, N>(x, b, b_stride, K, c, accumulate, own);
  ahead = own;
}

template <typename E, typename T, int N, int... M>
DotBlock<E, T> dot_block_for(int64_t m, std::integer_sequence<int, M...>) {
  static constexpr DotBlock<E, T> table[] = {dot_block_of<E, T, M + 1, N>...};
  return table[m - 1];
}

// Rows of x, zeros up to a whole step; the order within a step is that of operands().
template <typename T>
void lay_out_rows(const TileMatrix& a, int64_t M, int64_t K, Acc<T>* x) {
  using A = Acc<T>;
  constexpr int64_t kStep = kDotStep<T>;
  widen(a, M, K, x, kDotPitch);
  for (int64_t m = 0; m < M; ++m) {
    A* row = x + m * kDotPitch;
    for (int64_t i = K; i % kStep; ++i) row[i] = 0;
    if constexpr (std::is_same_v<T, bf16>)
      for (int64_t i = 0; i < K; i += kStep) {
        VecF even = load(row + i), odd = load(row + i + kLanes<A>);
        split_even_odd(even, odd, std::make_index_sequence<kLanes<A>>{});
        store(row + i, even);
        store(row + i + kLanes<A>, odd);
      }
  }
}

template <typename T>
void lay_out_rows(const TileMatrix& a, int64_t M, int64_t K, Pair* x) {
  copy_pairs(a, M, K, kDotStep<T>, x, kDotPitch);
}

// N columns of whole steps along K for all rows, which are divided into equal blocks.
template <typename E, typename T, int N>
void dot_columns(int64_t rows, const E* x, const T* b, int64_t b_stride, int64_t K, Acc<T>* c, bool accumulate) {
  constexpr int kMost = N > kDotN ? kLinearRows : kDotM;
  const int64_t blocks = (rows + kMost - 1) / kMost, pitch = b_stride * int64_t(sizeof(T));
  // The weight rows after these, at least kAheadBytes away: fetched while several blocks of x are multiplied.
  Ahead ahead;
  if (kSpreads && blocks > 1 && K > kDotStep<T>) {
    const char* next = reinterpret_cast<const char*>(b) + whole_blocks_ahead(N * pitch);
    ahead = Ahead::over(blocks * (K / kDotStep<T>), next, pitch, K * int64_t(sizeof(T)), N);
  }
  for (int64_t i = 0, m = 0, M; i < blocks; ++i, m += M) {
    M = (rows - m + blocks - i - 1) / (blocks - i);
    dot_block_for<E, T, N>(M, std::make_integer_sequence<int, kMost>{})(x + m * kDotPitch, b, b_stride, K,
                                                                        c + m * kTileColumns, accumulate, ahead);
  }
}

template <typename E, typename T>
void dot_all_columns(int64_t M, int64_t N, const E* x, const T* b, int64_t b_stride, int64_t K, Acc<T>* c,
                     bool accumulate) {
  int64_t n = 0;
  for (; n + 4 <= N; n += 4) {
    const T* rows = b + n * b_stride;
    if (kDotN == 4 || M <= kLinearRows) {
      dot_columns<E, T, 4>(M, x, rows, b_stride, K, c + n, accumulate);
    } else {
      dot_columns<E, T, 2>(M, x, rows, b_stride, K, c + n, accumulate);
      dot_columns<E, T, 2>(M, x, rows + 2 * b_stride, b_stride, K, c + n + 2, accumulate);
    }
  }
  for (; n < N; ++n) dot_columns<E, T, 1>(M, x, b + n * b_stride, b_stride, K, c + n, accumulate);
}

// One K block: whole steps of the weights as they lie, then what is left of them, copied and filled up with zeros.
template <typename E, typename T>
void dot_k_block(const GemmTile& t, const E* x, const TileMatrix& weights, int64_t k, int64_t K, void* out,
                 bool accumulate) {
  constexpr int64_t kStep = kDotStep<T>;
  const T* b = static_cast<const T*>(weights.data) + k;
  Acc<T>* c = static_cast<Acc<T>*>(out);
  const int64_t whole = K / kStep * kStep, rest = K - whole;
  if (whole || !rest) dot_all_columns(t.M, t.N, x, b, weights.row_stride, whole, c, accumulate);
  if (!rest) return;
  T last[kTileColumns * kStep];
  for (int64_t n = 0; n < t.N; ++n) {
    const T* from = b + n * weights.row_stride + whole;
    std::fill(std::copy_n(from, rest, last + n * kStep), last + (n + 1) * kStep, T{});
  }
  dot_all_columns(t.M, t.N, x + whole / kDepth<E>, last, kStep, kStep, c, accumulate || whole);
}

template <typename E, typename T>
void gemm_dots(const GemmTile& t) {
  E* x = static_cast<E*>(t.scratch);
  constexpr int64_t kBlock = kDepth<E> * kDotK;
  // Equal K blocks of whole steps: how they are cut depends on K alone.
  const int64_t blocks = (t.K + kBlock - 1) / kBlock;
  const int64_t block = blocks ? ((t.K + blocks - 1) / blocks + 63) / 64 * 64 : 1;
  for (int64_t k = 0; k < t.K || k == 0; k += block) {
    const int64_t K = t.K - k < block ? t.K - k : block;
    TileMatrix a = t.a.matrix;
    a.data = static_cast<const char*>(a.data) + k * a.col_stride * size_of(a.dtype);
    lay_out_rows<T>(a, t.M, K, x);
    dot_k_block<E, T>(t, x, t.b.matrix, k, K, t.c, t.accumulate || k > 0);
    if (t.c2) dot_k_block<E, T>(t, x, t.b2.matrix, k, K, t.c2, t.accumulate || k > 0);
  }
}

}  // namespace
}  // namespace moert::cpu
