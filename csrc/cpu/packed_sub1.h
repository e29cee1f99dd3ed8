// Rows of QMoE's code: a codeword at a time, its digits as two masks.
#pragma once

#include "cpu/packed_floats.h"
#include "moert/sub1.h"

namespace moert::cpu {
namespace {

constexpr uint32_t kSub1Digits = (1u << 28) - 1;

// The codewords of row n and the two values that its digits stand for.  What a broken row_ptr says beyond the matrix's
// codewords is not read.
struct Sub1Row {
  const uint16_t* codes;
  int64_t size;
  float low, high;

  Sub1Row(const PackedRows& b, int64_t n) {
    const int32_t* ends = reinterpret_cast<const int32_t*>(b.zeros) + n;
    const int64_t first = ends[0] < 0 ? 0 : smaller(ends[0], b.size), last = smaller(ends[1], b.size);
    codes = reinterpret_cast<const uint16_t*>(b.codes) + first;
    size = last - first;  // nothing, if negative
    low = to_float(static_cast<const bf16*>(b.scales)[2 * n]);
    high = to_float(static_cast<const bf16*>(b.scales)[2 * n + 1]);
  }
};

// f(column, masks) for the codewords that begin before column K; returns where the last one ends.
template <typename F>
MOERT_INLINE int64_t each_codeword(const Sub1Row& row, int64_t K, const F& f) {
  const Sub1Masks* table = sub1_masks();
  int64_t column = 0;
  for (int64_t i = 0; i < row.size && column < K; ++i) {
    const Sub1Masks masks = table[row.codes[i]];
    f(column, masks);
    column += masks.low_and_size >> 28 << 1;
  }
  return column;
}

void sub1_row(const PackedRows& b, int64_t n, float* out) {
  const Sub1Row row(b, n);
  const int64_t K = b.packing.columns;
  const int64_t end = each_codeword(row, K, [&](int64_t column, const Sub1Masks& masks) {
#if defined(__AVX512F__)
    const __m512 low = _mm512_set1_ps(row.low), high = _mm512_set1_ps(row.high);
    const auto values = [&](int shift) {
      const __m512 lows = _mm512_maskz_mov_ps(__mmask16((masks.low_and_size & kSub1Digits) >> shift), low);
      return _mm512_mask_mov_ps(lows, __mmask16(masks.high >> shift), high);
    };
    const int64_t left = K - column;
    const uint32_t there = left >= 32 ? ~0u : (1u << left) - 1;
    _mm512_mask_storeu_ps(out + column, __mmask16(there), values(0));
    _mm512_mask_storeu_ps(out + column + 16, __mmask16(there >> 16), values(16));
#else
    const int64_t count = smaller(K - column, masks.low_and_size >> 28 << 1);
    for (int64_t t = 0; t < count; ++t)
      out[column + t] = masks.low_and_size >> t & 1 ? row.low : masks.high >> t & 1 ? row.high : 0;
#endif
  });
  if (end < K) std::memset(out + end, 0, size_t(K - end) * sizeof(float));
}

#if defined(__AVX512F__)
// The sums of x where a digit is 1, and where it is 2.
template <int M>
void few_sub1_row(const FewRows& t, int64_t n, float* c) {
  const Sub1Row row(t.b, n);
  __m512 sums[M][2][2] = {};
  each_codeword(row, t.b.packing.columns, [&](int64_t column, const Sub1Masks& masks) {
    const uint32_t low = masks.low_and_size & kSub1Digits, high = masks.high;
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const float* x = t.x + m * t.stride + column;
      const __m512 first = _mm512_loadu_ps(x), second = _mm512_loadu_ps(x + 16);
      sums[m][0][0] = _mm512_mask_add_ps(sums[m][0][0], __mmask16(low), sums[m][0][0], first);
      sums[m][0][1] = _mm512_mask_add_ps(sums[m][0][1], __mmask16(low >> 16), sums[m][0][1], second);
      sums[m][1][0] = _mm512_mask_add_ps(sums[m][1][0], __mmask16(high), sums[m][1][0], first);
      sums[m][1][1] = _mm512_mask_add_ps(sums[m][1][1], __mmask16(high >> 16), sums[m][1][1], second);
    }
  });
  for (int m = 0; m < M; ++m) {
    const auto total = [&](int digit) {
      return sum_lanes(bit_cast_vector<VecF>(sums[m][digit][0]) + bit_cast_vector<VecF>(sums[m][digit][1]));
    };
    c[m * kTileColumns] = row.low * total(0) + row.high * total(1);
  }
}

// A zero weight times infinity or NaN is NaN: false where x has such, for the product that does not leave zeros out.
bool few_sub1(const FewRows& t) {
  VecI bad{};
  for (int64_t m = 0; m < t.M; ++m)
    for (int64_t i = 0; i < t.b.packing.columns; i += kLanes<float>)
      bad |= (load_vector<VecI>(t.x + m * t.stride + i) & 0x7f800000) == 0x7f800000;
  for (int i = 0; i < kLanes<int32_t>; ++i)
    if (bad[i]) return false;
  using Function = void (*)(const FewRows&, int64_t, float*);
  static constexpr Function rows[] = {few_sub1_row<1>, few_sub1_row<2>, few_sub1_row<3>, few_sub1_row<4>};
  for (int64_t n = 0; n < t.N; ++n) rows[t.M - 1](t, n, t.c + n);
  return true;
}
#else
// Without masks of lanes a row of floats is what costs least.
bool few_sub1(const FewRows&) { return false; }
#endif

}  // namespace
}  // namespace moert::cpu
