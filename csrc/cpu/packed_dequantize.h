// Packed rows as float32, for products with full activations.
#pragma once

#include "cpu/packed_floats.h"
#include "cpu/packed_sub1.h"

namespace moert::cpu {
namespace {

constexpr int64_t kChunk = 5 * kStep;      // whole bytes of every format
constexpr int64_t kSegment = 16 * kChunk;  // columns whose scales are widened at once: whole groups
constexpr int64_t kSegmentGroups = kSegment / kStep;

// 16 bytes of two codes each -> 32 codes in column order, or what a table of 16 has for them.
template <bool kLooksUp>
MOERT_INLINE void unpack_step(const uint8_t* bytes, uint8_t* out, [[maybe_unused]] const uint8_t* table = kE2m1) {
#if defined(__AVX2__)
  const __m128i both = load_vector<__m128i>(bytes), mask = _mm_set1_epi8(15);
  __m128i even = _mm_and_si128(both, mask), odd = _mm_and_si128(_mm_srli_epi16(both, 4), mask);
  if (kLooksUp) {
    const __m128i values = load_vector<__m128i>(table);
    even = _mm_shuffle_epi8(values, even);
    odd = _mm_shuffle_epi8(values, odd);
  }
  const __m128i first = _mm_unpacklo_epi8(even, odd), second = _mm_unpackhi_epi8(even, odd);
  std::memcpy(out, &first, 16);
  std::memcpy(out + 16, &second, 16);
#else
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 2; ++j) {
      const uint8_t code = TwoAByte::code(bytes[i], j);
      out[2 * i + j] = kLooksUp ? table[code] : code;
    }
#endif
}

// 8 bytes of four codes each -> 32 codes in column order.
MOERT_INLINE void unpack_trits(const uint8_t* bytes, uint8_t* out) {
#if defined(__AVX2__)
  const __m128i all = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)), mask = _mm_set1_epi8(3);
  const __m128i x = _mm_unpacklo_epi8(all, _mm_srli_epi16(all, 2));  // by turns codes 0 and 2, 1 and 3
  const __m128i low = _mm_and_si128(x, mask), high = _mm_and_si128(_mm_srli_epi16(x, 4), mask);
  const __m128i first = _mm_unpacklo_epi16(low, high), second = _mm_unpackhi_epi16(low, high);
  std::memcpy(out, &first, 16);
  std::memcpy(out + 16, &second, 16);
#else
  for (int i = 0; i < 8; ++i)
    for (int j = 0; j < 4; ++j) out[4 * i + j] = FourTritsAByte::code(bytes[i], j);
#endif
}

// The codes of kChunk columns, in place or in `out`, which has room for three bytes more.
template <Format kFormat>
MOERT_INLINE const uint8_t* unpack_chunk(const uint8_t* bytes, uint8_t* out) {
  if constexpr (kFormat == Format::int8) {
    return bytes;
  } else if constexpr (kFormat == Format::ternary2) {
    for (int64_t i = 0; i < kChunk / kStep; ++i) unpack_trits(bytes + 8 * i, out + kStep * i);
  } else if constexpr (kFormat == Format::ternary5) {
    for (int64_t i = 0; i < kChunk / 5; ++i) std::memcpy(out + 5 * i, kTrits.of_byte[bytes[i]], 8);
  } else {
    for (int64_t i = 0; i < kChunk / kStep; ++i) unpack_step<kFormat == Format::mxfp4>(bytes + 16 * i, out + kStep * i);
  }
  return out;
}

// A vector of signed codes.
MOERT_INLINE VecI widen_codes(const uint8_t* codes) {
#if defined(__AVX512F__)
  return bit_cast_vector<VecI>(_mm512_cvtepi8_epi32(load_vector<__m128i>(codes)));
#elif defined(__AVX2__)
  return bit_cast_vector<VecI>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes))));
#else
  VecI wide;
  for (int i = 0; i < kLanes<int32_t>; ++i) wide[i] = int8_t(codes[i]);
  return wide;
#endif
}

// scale * (code - zero) of n <= kStep columns; kStep codes are read.
MOERT_INLINE void step_to_floats(const uint8_t* codes, int64_t n, float scale, float zero, float* out) {
  const auto values = [&](int64_t i) { return (to_floats(widen_codes(codes + i)) - zero) * scale; };
  if (n == kStep) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < kStep; i += kLanes<float>) store(out + i, values(i));
  } else {
    for_vectors<float>(n, [&](int64_t i, auto count) { store(out + i, values(i), count); });
  }
}

#if defined(__AVX512BF16__)
// To the nearest bfloat16; a subnormal number becomes zero.
MOERT_INLINE void store_step(bf16* out, const VecF& low, const VecF& high) {
  const __m512bh both = _mm512_cvtne2ps_pbh(bit_cast_vector<__m512>(high), bit_cast_vector<__m512>(low));
  store_vector(out, both);
}

// All of a step is written.
MOERT_INLINE void step_to_floats(const uint8_t* codes, int64_t, float scale, float zero, bf16* out) {
  const auto values = [&](int64_t i) { return (to_floats(widen_codes(codes + i)) - zero) * scale; };
  store_step(out, values(0), values(kLanes<float>));
}
#endif

template <Format kFormat, typename Out>
void dequantize_row(const PackedRows& b, int64_t n, Out* out) {
  constexpr int64_t kUnit = weights_per_block(kFormat) / 16;  // columns a byte
  // ternary5's table has values; int8 is signed
  constexpr int kZero = kFormat == Format::int4       ? 8
                        : kFormat == Format::mxfp4    ? 12
                        : kFormat == Format::ternary2 ? 1
                                                      : 0;
  const Packing& p = b.packing;
  const int64_t bytes = row_bytes(p), per_row = groups(p);
  const uint8_t* row = b.codes + n * bytes;
  const uint8_t* zeros = b.zeros ? b.zeros + n * per_row : nullptr;
  // Groups of 32, 64 or 128 columns; one group a row goes on for ever.
  const int shift = p.group ? __builtin_ctzll(uint64_t(p.group)) : 62;
  for (int64_t segment = 0; segment < p.columns; segment += kSegment) {
    const int64_t end = smaller(p.columns, segment + kSegment), first = segment >> shift;
    float scales[kSegmentGroups];
    widen_scales(b, n, first, smaller(kSegmentGroups, per_row - first), scales);
    for (int64_t chunk = segment; chunk < end; chunk += kChunk) {
      const int64_t left = bytes - chunk / kUnit;
      uint8_t last[kChunk / kUnit], unpacked[kChunk + 3];
      const uint8_t* from = row + chunk / kUnit;
      if (left < kChunk / kUnit) {  // the row ends, and perhaps the memory
        std::memset(last, 0, sizeof last);
        std::memcpy(last, from, size_t(left));
        from = last;
      }
      const uint8_t* codes = unpack_chunk<kFormat>(from, unpacked);
      for (int64_t column = chunk; column < smaller(end, chunk + kChunk); column += kStep) {
        const int64_t g = column >> shift;
        const float zero = zeros ? float(zeros[g]) : float(kZero);
        step_to_floats(codes + column - chunk, smaller(kStep, end - column), scales[g - first], zero, out + column);
      }
    }
  }
}

// Row n of b.
void dequantize_float_row(const PackedRows& b, int64_t n, float* out) {
  using Row = void (*)(const PackedRows&, int64_t, float*);
  static constexpr Row rows[kFormats] = {dequantize_row<Format::int8, float>,
                                         dequantize_row<Format::int4, float>,
                                         dequantize_row<Format::int4_asymmetric, float>,
                                         dequantize_row<Format::mxfp4, float>,
                                         dequantize_row<Format::ternary2, float>,
                                         dequantize_row<Format::ternary5, float>,
                                         float_row<Fp8Row>,
                                         float_row<BitNestedRow>,
                                         sub1_row};
  rows[int(b.packing.format)](b, n, out);
}

void dequantize_rows(const PackedRows& b, int64_t N, float* out, int64_t stride) {
  for (int64_t n = 0; n < N; ++n) dequantize_float_row(b, n, out + n * stride);
}

void dequantize_bf16_rows(const PackedRows& b, int64_t N, bf16* out, int64_t stride, float* row) {
  for (int64_t n = 0; n < N; ++n) {
    dequantize_float_row(b, n, row);
    for_vectors<float>(b.packing.columns,
                       [&](int64_t i, auto count) { store(out + n * stride + i, load(row + i, count), count); });
  }
}

bool few_rows(const FewRows& t) {
  switch (t.b.packing.format) {
    case Format::fp8:
      few_products<Fp8Row>(t);
      return true;
    case Format::bit_nested:
      few_products<BitNestedRow>(t);
      return true;
    case Format::sub1:
      return few_sub1(t);
    default:
      return false;
  }
}

}  // namespace
}  // namespace moert::cpu
