// Packed weights that become float32 in registers, kStep columns at a time: multiplied there with few rows, or stored
// as the rows of float32 that more are multiplied with.
#pragma once

#include "cpu/packed_scales.h"
#include "moert/bit_nested.h"
#include "moert/fp8.h"

namespace moert::cpu {
namespace {

constexpr int64_t kStep = 32;  // columns that share a scale in every format
constexpr int kFewBlock = 4;   // weight rows that are multiplied at a time
constexpr int kStepVectors = int(kStep) / kLanes<float>;

MOERT_INLINE float widen_scale(f16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  return to_float(x);
#endif
}

// A row of fp8.  step() leaves the values of kStep columns, divided by kFactor and the scale that it returns.
struct Fp8Row {
  static constexpr float kFactor = 256;  // an e4m3 code, moved to its place in a float16, is 2^-8 of itself
  const uint8_t* codes;
  const float* scales;
  int64_t bytes, ahead;

  Fp8Row(const PackedRows& b, int64_t n)
      : codes(b.codes + n * row_bytes(b.packing)),
        scales(static_cast<const float*>(b.scales) + (b.row + n) / kFp8Block * groups(b.packing)),
        bytes(row_bytes(b.packing)),
        ahead(whole_blocks_ahead(kFewBlock * bytes)) {}

  MOERT_INLINE static VecF values(const uint8_t* codes) {
#if defined(__AVX512F__)
    const __m256i wide = _mm256_cvtepi8_epi16(load_vector<__m128i>(codes));
    const __m256i half = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(int16_t(0xbfff)));
    return bit_cast_vector<VecF>(_mm512_cvtph_ps(half));
#elif defined(__AVX2__)
    const __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
    const __m128i half = _mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16(int16_t(0xbfff)));
    return bit_cast_vector<VecF>(_mm256_cvtph_ps(half));
#else
    VecF y;
    for (int i = 0; i < kLanes<float>; ++i) {
      const f16 half = {uint16_t((codes[i] & 0x7f) << 7 | (codes[i] & 0x80) << 8)};
      y[i] = to_float(half);
    }
    return y;
#endif
  }

  MOERT_INLINE float step(int64_t s, VecF* v) {
    const uint8_t* from = codes + s * kStep;
    __builtin_prefetch(from + ahead, 0, 2);
    uint8_t last[kStep];
    if (bytes - s * kStep < kStep) {  // the row ends, and perhaps the memory
      std::memset(last, 0, kStep);
      std::memcpy(last, from, kStep / 2);
      from = last;
    }
#pragma GCC unroll 8
    for (int i = 0; i < kStepVectors; ++i) v[i] = values(from + i * kLanes<float>);
    return scales[s / (kFp8Block / kStep)];
  }
};

// The bits of a byte as bytes 0 or 1, the lowest first.
struct SpreadBits {
  uint8_t of_byte[256][8] = {};
  constexpr SpreadBits() {
    for (int byte = 0; byte < 256; ++byte)
      for (int j = 0; j < 8; ++j) of_byte[byte][j] = uint8_t(byte >> j & 1);
  }
};
constexpr SpreadBits kSpreadBits;

// A row of bit-nested weights.
struct BitNestedRow {
  static constexpr float kFactor = 1;
  const uint8_t* codes;
  const f16* scales;
  const uint8_t* zeros;
  int64_t plane_stride, scale_stride, group_steps;
  int base, levels;
  float scale[8], zero;
  VecF table;  // the values of the first kLanes<float> codes

  BitNestedRow(const PackedRows& b, int64_t n)
      : codes(b.codes + n * row_bytes(b.packing)),
        scales(static_cast<const f16*>(b.scales) + n * groups(b.packing)),
        zeros(b.zeros + n * groups(b.packing)),
        plane_stride(b.packing.rows * row_bytes(b.packing)),
        scale_stride(b.packing.rows * groups(b.packing)),
        group_steps(b.packing.group / kStep),
        base(int(b.packing.base)),
        levels(int(b.packing.levels)) {}

  MOERT_INLINE VecF values_of(const VecI& code) const {
    VecF v = (to_floats(code & ((1 << base) - 1)) - zero) * scale[0];
    for (int level = 1; level < levels; ++level) {
      const VecI bit = (code >> (base + level - 1)) & 1;
      v = v + select(bit != 0, splat(scale[level]), splat(-scale[level]));
    }
    return v;
  }

  MOERT_INLINE void begin_group(int64_t g) {
    for (int level = 0; level < levels; ++level) scale[level] = widen_scale(scales[level * scale_stride + g]);
    zero = float(zeros[g]);
    VecI each;
    for (int i = 0; i < kLanes<float>; ++i) each[i] = i;
    table = values_of(each);
  }

  // The planes' bits of kStep columns, together: a byte each.
  MOERT_INLINE void gather(int64_t s, uint8_t* out) const {
    const uint8_t* from = codes + s * (kStep / 8);
#if defined(__AVX512F__)
    __m256i code = _mm256_setzero_si256(), bit = _mm256_set1_epi8(1);
    for (int i = 0; i < base + levels - 1; ++i, from += plane_stride) {
      uint32_t mask;
      std::memcpy(&mask, from, 4);
      code = _mm256_mask_add_epi8(code, mask, code, bit);
      bit = _mm256_add_epi8(bit, bit);
    }
    std::memcpy(out, &code, sizeof code);
#else
    for (int64_t j = 0; j < kStep / 8; ++j) {
      uint64_t all = 0;
      for (int i = 0; i < base + levels - 1; ++i) {
        uint64_t bits;
        std::memcpy(&bits, kSpreadBits.of_byte[from[i * plane_stride + j]], 8);
        all |= bits << i;
      }
      std::memcpy(out + 8 * j, &all, 8);
    }
#endif
  }

  MOERT_INLINE static VecI widen(const uint8_t* bytes) {
#if defined(__AVX512F__)
    return bit_cast_vector<VecI>(_mm512_cvtepu8_epi32(load_vector<__m128i>(bytes)));
#elif defined(__AVX2__)
    return bit_cast_vector<VecI>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes))));
#else
    VecI y;
    for (int i = 0; i < kLanes<int32_t>; ++i) y[i] = bytes[i];
    return y;
#endif
  }

  MOERT_INLINE float step(int64_t s, VecF* v) {
    if (s % group_steps == 0) begin_group(s / group_steps);
    uint8_t code[kStep];
    gather(s, code);
#if defined(__AVX512F__)
    if (base + levels <= 5) {
      for (int i = 0; i < kStepVectors; ++i) {
        const __m512i index = bit_cast_vector<__m512i>(widen(code + i * kLanes<float>));
        v[i] = bit_cast_vector<VecF>(_mm512_permutexvar_ps(index, bit_cast_vector<__m512>(table)));
      }
      return 1;
    }
#endif
    for (int i = 0; i < kStepVectors; ++i) v[i] = values_of(widen(code + i * kLanes<float>));
    return 1;
  }
};

// Row n of b as float32.
template <typename Row>
void float_row(const PackedRows& b, int64_t n, float* out) {
  Row row(b, n);
  const int64_t K = b.packing.columns;
  for (int64_t s = 0; s * kStep < K; ++s) {
    VecF v[kStepVectors];
    const float scale = row.step(s, v);
    for (int i = 0; i < kStepVectors; ++i) {
      const int64_t column = s * kStep + i * kLanes<float>, left = K - column;
      const VecF y = v[i] * Row::kFactor * scale;
      if (left >= kLanes<float>)
        store(out + column, y);
      else if (left > 0)
        store_first(out + column, y, left);
    }
  }
}

// c [M, kFewBlock] of the weight rows from n on; those past the last repeat it.
template <typename Row, int M>
void few_block(const FewRows& t, int64_t n, const float* x, float* c) {
  const int64_t last = t.N - 1, count = t.N - n < kFewBlock ? t.N - n : kFewBlock;
  Row rows[kFewBlock] = {
      {t.b, n}, {t.b, smaller(n + 1, last)}, {t.b, smaller(n + 2, last)}, {t.b, smaller(n + 3, last)}};
  VecF sums[M][kFewBlock] = {};
  for (int64_t s = 0; s * kStep < t.b.packing.columns; ++s) {
#pragma GCC unroll 4
    for (int r = 0; r < kFewBlock; ++r) {
      VecF v[kStepVectors];
      const float scale = rows[r].step(s, v);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const float* values = x + m * t.stride + s * kStep;
        VecF sum = v[0] * load(values);
#pragma GCC unroll 8
        for (int i = 1; i < kStepVectors; ++i) sum += v[i] * load(values + i * kLanes<float>);
        sums[m][r] += sum * scale;
      }
    }
  }
  for (int m = 0; m < M; ++m) {
    float total[kFewBlock];
    add_lanes_of_four<float>(sums[m], total, false);
    for (int r = 0; r < count; ++r) c[m * kTileColumns + r] = total[r] * Row::kFactor;
  }
}

template <typename Row>
void few_products(const FewRows& t) {
  using Function = void (*)(const FewRows&, int64_t, const float*, float*);
  static constexpr Function blocks[] = {few_block<Row, 1>, few_block<Row, 2>, few_block<Row, 3>, few_block<Row, 4>};
  static_assert(kFewRows == 4);
  for (int64_t n = 0; n < t.N; n += kFewBlock) blocks[t.M - 1](t, n, t.x, t.c + n);
}

}  // namespace
}  // namespace moert::cpu
