// How bfloat16 operands are laid out for products of pairs along K: kDepth elements of a row, or of a column, in one
// 32-bit word.  Nothing is widened, so a panel costs half of what it costs in float32.
#pragma once

#include <algorithm>

#include "cpu/gemm_epilogue.h"

namespace moert::cpu {
namespace {

// Elements along K in one element of a laid-out operand.
template <typename E>
constexpr int64_t kDepth = std::is_same_v<E, Pair> ? 2 : 1;

inline const bf16* row_of(const TileMatrix& in, int64_t r) {
  return static_cast<const bf16*>(in.data) + (in.index ? in.index[r] : r) * in.row_stride;
}

// 16 pairs at p, of which the first n elements count; zeros after them.
MOERT_INLINE Vec<Pair> load_pairs(const bf16* p, int64_t n) {
  if (n >= 2 * kLanes<Pair>) return load(reinterpret_cast<const Pair*>(p));
  bf16 part[2 * kLanes<Pair>] = {};
  std::memcpy(part, p, n * sizeof(bf16));
  return load(reinterpret_cast<const Pair*>(part));
}

// out[m] = the K elements of row m as they lie, then zeros up to a multiple of `step` elements; rows `pitch` pairs
// apart.
void copy_pairs(const TileMatrix& in, int64_t M, int64_t K, int64_t step, Pair* out, int64_t pitch) {
  for (int64_t m = 0; m < M; ++m) {
    const bf16* row = row_of(in, m);
    bf16* y = reinterpret_cast<bf16*>(out + m * pitch);
    if (in.col_stride == 1)
      std::copy_n(row, K, y);  // memcpy may not be given the null row of K = 0
    else
      for (int64_t k = 0; k < K; ++k) y[k] = row[k * in.col_stride];
    for (int64_t k = K; k % step; ++k) y[k] = {};
  }
}

// What is read after the rows k and k + 1, too far away for the CPU to foresee it: of one panel the next panel of both
// rows, of more the rows some pairs below.
MOERT_INLINE void prefetch_after(const TileMatrix& in, int64_t k, int64_t end, int64_t N) {
  constexpr int64_t kPanelOf = 2 * kLanes<Pair>, kRowsAhead = 16;
  for (int64_t r = k; r < k + 2 && r < end; ++r) {
    if (N <= kPanelOf) {
      __builtin_prefetch(row_of(in, r) + kPanelOf, 0, 2);
    } else if (r + kRowsAhead < end) {
      const bf16* row = row_of(in, r + kRowsAhead);
      for (int64_t n = 0; n < N; n += kPanelOf) __builtin_prefetch(row + n, 0, 2);
    }
  }
}

// out[k / 2][n] = elements n of the rows k and k + 1, n < N; rows `pitch` pairs apart, zeros from N to `width`.
void interleave_rows(const TileMatrix& in, int64_t k, int64_t K, int64_t N, int64_t width, Pair* out, int64_t pitch) {
  using V = Vec<Pair>;
  for (const int64_t end = k + K; k < end; k += 2, out += pitch) {
    const bf16 *first = row_of(in, k), *second = k + 1 < end ? row_of(in, k + 1) : nullptr;
    if (in.col_stride == 1) {
      prefetch_after(in, k, end, N);
      for_vectors<float>(N, [&](int64_t n, auto count) {
        const V low = bit_cast_vector<V>(load(first + n, count)) >> 16;
        const V high = second ? bit_cast_vector<V>(load(second + n, count)) : V{};
        const V pairs = low | high;
        std::memcpy(out + n, &pairs, count * sizeof(Pair));
      });
    } else {
      for (int64_t n = 0; n < N; ++n) {
        const bf16 low = first[n * in.col_stride], high = second ? second[n * in.col_stride] : bf16{};
        out[n] = Pair(low.bits) | Pair(high.bits) << 16;
      }
    }
    for (int64_t n = N; n < width; ++n) out[n] = 0;
  }
}

#if defined(__AVX512F__)
// out[i] = pair i of each of 16 rows.  Quarters of four rows meet as they are loaded, on ports that shuffles leave
// free.
MOERT_INLINE void load_transposed(const bf16* const* rows, Vec<Pair>* out) {
#pragma GCC unroll 4
  for (int quarter = 0; quarter < 4; ++quarter) {
    const auto four = [&](int row) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[row] + 8 * quarter));
    };
    __m512i x[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      x[i] = _mm512_inserti32x4(_mm512_castsi128_si512(four(i)), four(4 + i), 1);
      x[i] = _mm512_inserti32x4(_mm512_inserti32x4(x[i], four(8 + i), 2), four(12 + i), 3);
    }
    const __m512i low = _mm512_unpacklo_epi32(x[0], x[1]), low2 = _mm512_unpacklo_epi32(x[2], x[3]);
    const __m512i high = _mm512_unpackhi_epi32(x[0], x[1]), high2 = _mm512_unpackhi_epi32(x[2], x[3]);
    out[4 * quarter] = bit_cast_vector<Vec<Pair>>(_mm512_unpacklo_epi64(low, low2));
    out[4 * quarter + 1] = bit_cast_vector<Vec<Pair>>(_mm512_unpackhi_epi64(low, low2));
    out[4 * quarter + 2] = bit_cast_vector<Vec<Pair>>(_mm512_unpacklo_epi64(high, high2));
    out[4 * quarter + 3] = bit_cast_vector<Vec<Pair>>(_mm512_unpackhi_epi64(high, high2));
  }
}
#endif

// panel[k / 2, n] = elements k and k + 1 of row n < N, zeros from N on; rows of `in` run along K.
template <int64_t kWidth>
void transpose_pairs(const TileMatrix& in, int64_t row, int64_t N, int64_t K, Pair* panel) {
  constexpr int L = kLanes<Pair>;
  if (in.col_stride != 1) {
    for (int64_t n = 0; n < kWidth; ++n)
      for (int64_t k = 0; k < K; k += 2) {
        const bf16* source = n < N ? row_of(in, row + n) + k * in.col_stride : nullptr;
        const uint32_t low = n < N ? source->bits : 0, high = n < N && k + 1 < K ? source[in.col_stride].bits : 0;
        panel[k / 2 * kWidth + n] = low | high << 16;
      }
    return;
  }
  for (int64_t half = 0; half < kWidth; half += L) {
    const bf16* sources[L];
    for (int i = 0; i < L; ++i) sources[i] = half + i < N ? row_of(in, row + half + i) : nullptr;
    for (int64_t k = 0; k < K; k += 2 * L) {
      Vec<Pair> rows[L];
      // The next panel's rows: too many streams for the CPU to foresee.
      for (int i = 0; i < L; ++i)
        if (sources[i]) __builtin_prefetch(sources[i] + k + kWidth * in.row_stride, 0, 2);
#if defined(__AVX512F__)
      if (half + L <= N && k + 2 * L <= K) {
        const bf16* at[L];
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) at[i] = sources[i] + k;
        load_transposed(at, rows);
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) store(panel + (k / 2 + i) * kWidth + half, rows[i]);
        continue;
      }
#endif
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) rows[i] = sources[i] ? load_pairs(sources[i] + k, K - k) : Vec<Pair>{};
      transpose<L / 2>(rows);
      const int64_t pairs = (K - k + 1) / 2;
      for (int64_t i = 0; i < (pairs < L ? pairs : L); ++i) store(panel + (k / 2 + i) * kWidth + half, rows[i]);
    }
  }
}

}  // namespace
}  // namespace moert::cpu
