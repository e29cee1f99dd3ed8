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

// The value of a code, those of mxfp4 doubled, as widen_scales halves its scales; int4_asymmetric: without its zero.
template <Format kFormat>
constexpr int value_of_four(int code) {
  return kFormat == Format::mxfp4 ? kE2m1[code] - 12 : kFormat == Format::int4 ? code - 8 : code;
}

// What |value| can be.
constexpr float largest_value(Format format) { return format == Format::int8 ? 127 : format == Format::mxfp4 ? 12 : 8; }

// All of them, times 2^kValueBits.
struct ValuesOfFour {
  int16_t of_code[16];
  template <Format kFormat>
  static constexpr ValuesOfFour of() {
    ValuesOfFour values{};
    for (int c = 0; c < 16; ++c) values.of_code[c] = int16_t(value_of_four<kFormat>(c) << kValueBits);
    return values;
  }
};
template <Format kFormat>
alignas(32) constexpr ValuesOfFour kValuesOfFour = ValuesOfFour::of<kFormat>();

// Of the groups of one row.
struct RowFactors {
  int16_t* factors;  // times 2^kFactorBits
  int16_t* zeros;    // times 2^kValueBits; of int4_asymmetric
};

// Reads scales and fills factors up to the end of a vector, and returns the scale of row n, whose groups have these
// scales.
MOERT_INLINE float scale_row(const PackedRows& b, int64_t n, const float* scales, const RowFactors& to) {
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
  const float scale = row_scale(most, kLargestInt8), unit = scale > 0 ? (1 << kFactorBits) / scale : 0;
  for (int64_t g = 0; g < count; g += kLanes<float>) {
    using Words __attribute__((vector_size(2 * kLanes<float>))) = int16_t;
    const VecI factors = nearest_integers(load(scales + g) * unit);
    store_vector(to.factors + g, __builtin_convertvector(factors, Words));
  }
  return scale;
}

// What a code of this value becomes.
MOERT_INLINE int8_t requantized_code(int value, int factor) {
  return int8_t(((value * factor >> (kFactorBits - 1)) + 1) >> 1);
}

#if defined(__AVX512F__)
// Every 16 bytes have what the group of their 32 columns has, of kGroups in 128 columns; four are read.
template <int kGroups>
MOERT_INLINE __m512i spread_groups(const int16_t* of_groups) {
  const auto bytes = [](int lane) { return 0x0100010001000100 + 0x0202020202020202 * (lane * kGroups / 4); };
  const __m512i index =
      _mm512_setr_epi64(bytes(0), bytes(0), bytes(1), bytes(1), bytes(2), bytes(2), bytes(3), bytes(3));
  return _mm512_shuffle_epi8(_mm512_set1_epi64(load_vector<int64_t>(of_groups)), index);
}

// For every 32 of 128 columns the 16 codes that theirs become.
template <Format kFormat, int kGroups>
MOERT_INLINE __m512i requantized_tables(const RowFactors& row, int64_t g) {
  const auto values = [](int first) {
    return _mm512_broadcast_i32x4(load_vector<__m128i>(kValuesOfFour<kFormat>.of_code + first));
  };
  __m512i low = values(0), high = values(8);
  if constexpr (kFormat == Format::int4_asymmetric) {
    const __m512i zeros = spread_groups<kGroups>(row.zeros + g);
    low = _mm512_sub_epi16(low, zeros), high = _mm512_sub_epi16(high, zeros);
  }
  const __m512i factors = spread_groups<kGroups>(row.factors + g);
  return _mm512_packs_epi16(_mm512_mulhrs_epi16(low, factors), _mm512_mulhrs_epi16(high, factors));
}

// 64 bytes of two codes each -> what the tables have for 128 columns, in their order.
MOERT_INLINE void look_up_pairs(const VecB& pairs, const __m512i& tables, uint8_t* out) {
  const auto look_up = [&](const VecB& codes) {
    return _mm512_shuffle_epi8(tables, bit_cast_vector<__m512i>(codes & uint8_t(15)));
  };
  const __m512i even = look_up(pairs), odd = look_up(pairs >> 4);
  const __m512i low = _mm512_unpacklo_epi8(even, odd), high = _mm512_unpackhi_epi8(even, odd);
  const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11),
                second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  store_vector(out, _mm512_permutex2var_epi64(low, first, high));
  store_vector(out + 64, _mm512_permutex2var_epi64(low, second, high));
}
#endif

// Row n of two codes a byte with kGroups groups in 128 columns; `out` is written up to the end of a block of 128.
template <Format kFormat, int kGroups>
void requantize_pairs(const PackedRows& b, int64_t n, const RowFactors& of, uint8_t* out) {
  const int64_t bytes = row_bytes(b.packing);
  const uint8_t* row = b.codes + n * bytes;
#if defined(__AVX512F__)
  for (int64_t i = 0, g = 0; i < bytes; i += 64, g += kGroups) {
    const VecB pairs = bytes - i < 64 ? load_last(row + i, bytes - i) : load_vector<VecB>(row + i);
    look_up_pairs(pairs, requantized_tables<kFormat, kGroups>(of, g), out + 2 * i);
    __builtin_prefetch(row + i + kAheadBytes / 2, 0, 2);
  }
#else
  alignas(16) uint8_t table[16];
  for (int64_t i = 0; i < bytes; i += 16) {
    const int64_t g = i / 16 * kGroups / 4;
    const int zero = kFormat == Format::int4_asymmetric ? of.zeros[g] >> kValueBits : 0;
    for (int c = 0; c < 16; ++c) table[c] = uint8_t(requantized_code(value_of_four<kFormat>(c) - zero, of.factors[g]));
    unpack_step<true>(row + i, out + 2 * i, table);
  }
#endif
}

template <Format kFormat>
void requantize_pairs(const PackedRows& b, int64_t n, const RowFactors& of, uint8_t* out) {
  switch (b.packing.group) {
    case 32:
      return requantize_pairs<kFormat, 4>(b, n, of, out);
    case 64:
      return requantize_pairs<kFormat, 2>(b, n, of, out);
    default:
      return requantize_pairs<kFormat, 1>(b, n, of, out);
  }
}

void requantize_int8(const PackedRows& b, int64_t n, const RowFactors& of, uint8_t* out) {
  const int64_t bytes = row_bytes(b.packing), group = b.packing.group;
  const uint8_t* row = b.codes + n * bytes;
  for (int64_t i = 0; i < bytes; i += kLanes<float>) {
    const VecI codes = widen_codes(row + i) * int32_t(of.factors[i / group]);
    narrow_codes((codes + (1 << kFactorBits >> 1)) >> kFactorBits, reinterpret_cast<int8_t*>(out + i));
    __builtin_prefetch(row + i + kAheadBytes / 2, 0, 2);
  }
}

// f of parts of t whose weights are int8 rows, a scale each.
template <typename F>
void requantized(const PackedTile& t, const F& f) {
  using Row = void (*)(const PackedRows&, int64_t, const RowFactors&, uint8_t*);
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
  part.next_bytes = row_bytes(packing);
  for (int64_t n = 0; n < t.N; n += kRequantizedRows) {
    part.N = smaller(kRequantizedRows, t.N - n);
    part.c = t.c + n;
    part.next = t.b.codes + (n + part.N) * part.next_bytes;
    const char* next = static_cast<const char*>(t.b.scales) + (n + part.N) * size;
    widen_scales(t.b, n, 0, part.N * per_row, of_groups);
    for (int64_t r = 0; r < part.N; ++r) {
      for (int64_t i = 0; i < size; i += 64) __builtin_prefetch(next + r * size + i, 0, 2);
      of_rows[r] = scale_row(t.b, n + r, of_groups + r * per_row, of);
      rows[int(packing.format)](t.b, n + r, of, codes + r * row_bytes(part.b.packing));
    }
    f(part);
  }
}

}  // namespace
}  // namespace moert::cpu
