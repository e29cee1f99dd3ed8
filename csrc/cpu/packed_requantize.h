// Weights in groups as int8 rows of one scale each (Precision::int8_weights), so that sums of whole rows are integers.
//
// The scale of a row is the largest value that its groups can hold, by their scales alone, over 127.  A group's scale
// over the row's, to the nearest 2048th, is the group's factor; a code is what the weight's code stands for times the
// factor, to the nearest integer, halves up.
#pragma once

#include "cpu/packed_dequantize.h"

namespace moert::cpu {
namespace {

constexpr int kFactorBits = 11;  // of the fraction: 127 / 8, the largest factor, fits 16 bits
constexpr int kValueBits = 15 - kFactorBits;
constexpr int kHalf = 1 << (kFactorBits - 1);

// The value of a code, those of mxfp4 doubled, as widen_scales halves its scales; int4_asymmetric: without its zero.
template <Format kFormat>
constexpr int value_of_four(int code) {
  return kFormat == Format::mxfp4 ? kE2m1[code] - 12 : kFormat == Format::int4 ? code - 8 : code;
}

// What |value| can be.
constexpr float largest_value(Format format) { return format == Format::int8 ? 127 : format == Format::mxfp4 ? 12 : 8; }

// Of the groups of one row.
struct RowFactors {
  int16_t* factors;  // times 2^kFactorBits
  int16_t* zeros;    // times 2^kValueBits; of int4_asymmetric
};

// Fills the factors of row n, whose groups have these scales, and returns the row's scale: 0 where its inverse would
// not be finite.  Scales are read and factors written up to the end of a vector.
MOERT_INLINE float factors_of_row(const PackedRows& b, int64_t n, const float* scales, const RowFactors& to) {
  const int64_t count = groups(b.packing);
  const float largest = largest_value(b.packing.format);
  uint32_t most = 0;
  const auto see = [&](float value) { most = std::max(most, float_to_bits(value) & 0x7fffffffu); };
  if (b.packing.format == Format::int4_asymmetric) {
    const uint8_t* zeros = b.zeros + n * count;
    for (int64_t g = 0; g < count; ++g) see(scales[g] * float(std::max<int>(zeros[g], 15 - zeros[g])));
    for (int64_t g = 0; g < count; ++g) to.zeros[g] = int16_t(zeros[g] << kValueBits);
  } else {
    for (int64_t g = 0; g < count; ++g) see(scales[g] * largest);
  }
  float scale = row_scale(most, kLargestInt8);
  if (scale < 0x1p-116f) scale = 0;
  const float unit = scale > 0 ? (1 << kFactorBits) / scale : 0;
  for (int64_t g = 0; g < count; g += kLanes<float>) {
    using Words __attribute__((vector_size(2 * kLanes<float>))) = int16_t;
    // Scales behind the row's and those that are no numbers: what becomes of them does not matter, but has to exist.
    VecF factors = load(scales + g) * unit;
    factors = factors > -32768.0f ? factors : splat(-32768.0f);
    factors = factors < 32767.0f ? factors : splat(32767.0f);
    store_vector(to.factors + g, __builtin_convertvector(nearest_integers(factors), Words));
  }
  return scale;
}

#if defined(__AVX512F__)
// The values of all codes of 4 bits, times 2^kValueBits.
template <Format kFormat>
struct ValuesOfFour {
  int16_t of_code[16];
  constexpr ValuesOfFour() : of_code{} {
    for (int c = 0; c < 16; ++c) of_code[c] = int16_t(value_of_four<kFormat>(c) * (1 << kValueBits));
  }
  __m512i eight(int first) const { return _mm512_broadcast_i32x4(load_vector<__m128i>(of_code + first)); }
};

// Where every 16 bytes take what the group of their 32 columns has, of 1, 2 or 4 groups in 128 columns.
MOERT_INLINE __m512i spread_index(int64_t groups) {
  const auto bytes = [&](int64_t lane) { return 0x0100010001000100 + 0x0202020202020202 * (lane * groups / 4); };
  return _mm512_setr_epi64(bytes(0), bytes(0), bytes(1), bytes(1), bytes(2), bytes(2), bytes(3), bytes(3));
}

MOERT_INLINE __m512i spread(const int16_t* of_groups, const __m512i& index) {  // four are read
  return _mm512_shuffle_epi8(_mm512_set1_epi64(load_vector<int64_t>(of_groups)), index);
}

// 64 bytes of two codes each -> what the tables, one for every 16 bytes, have for 128 columns, in their order.
MOERT_INLINE void look_up_pairs(const VecB& pairs, const __m512i& tables, uint8_t* out) {
  const auto look_up = [&](const VecB& codes) { return _mm512_shuffle_epi8(tables, bit_cast_vector<__m512i>(codes)); };
  const __m512i even = look_up(pairs & uint8_t(15)), odd = look_up(pairs >> 4);
  const __m512i low = _mm512_unpacklo_epi8(even, odd), high = _mm512_unpackhi_epi8(even, odd);
  const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
  const __m512i second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  store_vector(out, _mm512_permutex2var_epi64(low, first, high));
  store_vector(out + 64, _mm512_permutex2var_epi64(low, second, high));
}
#endif

// Row n of two codes a byte; `out` is written up to the end of a block of 128 columns.
template <Format kFormat>
void requantize_pairs(const PackedRows& b, int64_t n, const RowFactors& of, uint8_t* out) {
  const int64_t bytes = row_bytes(b.packing);
  const uint8_t* row = b.codes + n * bytes;
#if defined(__AVX512F__)
  static constexpr ValuesOfFour<kFormat> values;
  const int64_t groups = 128 / b.packing.group;
  const __m512i index = spread_index(groups);
  for (int64_t i = 0, g = 0; i < bytes; i += 64, g += groups) {
    const __m512i factors = spread(of.factors + g, index);
    __m512i low = values.eight(0), high = values.eight(8);
    if constexpr (kFormat == Format::int4_asymmetric) {
      const __m512i zeros = spread(of.zeros + g, index);
      low = _mm512_sub_epi16(low, zeros), high = _mm512_sub_epi16(high, zeros);
    }
    // For every 16 bytes the 16 codes that theirs become.
    const __m512i tables = _mm512_packs_epi16(_mm512_mulhrs_epi16(low, factors), _mm512_mulhrs_epi16(high, factors));
    const VecB pairs = bytes - i < 64 ? load_last(row + i, bytes - i) : load_vector<VecB>(row + i);
    look_up_pairs(pairs, tables, out + 2 * i);
    __builtin_prefetch(row + i + kAheadBytes / 2, 0, 2);
  }
#else
  alignas(16) uint8_t table[16];
  for (int64_t i = 0; i < bytes; i += 16) {
    const int64_t g = 2 * i / b.packing.group;
    const int zero = kFormat == Format::int4_asymmetric ? of.zeros[g] >> kValueBits : 0;
    for (int c = 0; c < 16; ++c)
      table[c] = uint8_t(((value_of_four<kFormat>(c) - zero) * of.factors[g] + kHalf) >> kFactorBits);
    unpack_step<true>(row + i, out + 2 * i, table);
  }
#endif
}

void requantize_int8(const PackedRows& b, int64_t n, const RowFactors& of, uint8_t* out) {
  const int64_t bytes = row_bytes(b.packing), group = b.packing.group;
  const uint8_t* row = b.codes + n * bytes;
  for (int64_t i = 0; i < bytes; i += kLanes<float>) {
    const VecI codes = widen_codes(row + i) * int32_t(of.factors[i / group]);
    narrow_codes((codes + kHalf) >> kFactorBits, reinterpret_cast<int8_t*>(out + i));
    __builtin_prefetch(row + i + kAheadBytes / 2, 0, 2);
  }
}

// f of parts of t whose weights are int8 rows, a scale each.
template <typename F>
void requantized(const PackedTile& t, const F& f) {
  using Row = void (*)(const PackedRows&, int64_t, const RowFactors&, uint8_t*);
  static_assert(int(Format::int8) == 0 && int(Format::mxfp4) == 3);  // what `takes` lets through
  static constexpr Row rows[] = {requantize_int8, requantize_pairs<Format::int4>,
                                 requantize_pairs<Format::int4_asymmetric>, requantize_pairs<Format::mxfp4>};
  const Packing& packing = t.b.packing;
  const int64_t K = packing.columns, per_row = groups(packing), size = per_row * scale_bytes(packing.format);
  uint8_t* codes = reinterpret_cast<uint8_t*>(t.scratch + packed_scratch(K));
  float* of_rows = reinterpret_cast<float*>(codes + requantized_codes(K));
  float* of_groups = of_rows + kRequantizedRows;
  int16_t* words = reinterpret_cast<int16_t*>(of_groups + kRequantizedRows * per_row + kRequantizedBehind);
  const RowFactors of{words, words + per_row + kRequantizedBehind};
  PackedTile part = t;
  part.precision = Precision::int8;
  part.b = {{Format::int8, kRequantizedRows, K, 0}, codes, of_rows, nullptr};
  part.b.float_scales = true;
  for (int64_t n = 0; n < t.N; n += kRequantizedRows) {
    part.N = smaller(kRequantizedRows, t.N - n);
    part.c = t.c + n;
    const char* next = static_cast<const char*>(t.b.scales) + (n + part.N) * size;
    widen_scales(t.b, n, 0, part.N * per_row, of_groups);
    for (int64_t r = 0; r < part.N; ++r) {
      for (int64_t i = 0; i < size; i += 64) __builtin_prefetch(next + r * size + i, 0, 2);
      of_rows[r] = factors_of_row(t.b, n + r, of_groups + r * per_row, of);
      rows[int(packing.format)](t.b, n + r, of, codes + r * row_bytes(part.b.packing));
    }
    f(part);
  }
}

}  // namespace
}  // namespace moert::cpu
