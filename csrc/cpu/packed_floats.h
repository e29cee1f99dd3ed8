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
    VecI wide;
    for (int i = 0; i < kLanes<float>; ++i) wide[i] = codes[i];
    const VecI size = wide & 0x7f;  // below 8 subnormal: multiples of 2^-9
    const VecF y = select(size < 8, to_floats(size) * 0x1p-9f, bit_cast_vector<VecF>((size << 20) + (120 << 23)));
    return bit_cast_vector<VecF>(bit_cast_vector<VecI>(y) | (wide & 0x80) << 24) / kFactor;
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

// Bytes of a and b by turns, of every 16 the lower (kUpper: the upper) half.
template <bool kUpper, size_t... I>
MOERT_INLINE VecB interleave(const VecB& a, const VecB& b, std::index_sequence<I...>) {
#define MOERT_PLACE (I / 16 * 16 + (kUpper ? 8 : 0) + I % 16 / 2 + (I % 2 ? sizeof...(I) : 0))
#if defined(__clang__)
  return __builtin_shufflevector(a, b, int(MOERT_PLACE)...);
#else
  return __builtin_shuffle(a, b, VecB{uint8_t(MOERT_PLACE)...});
#endif
#undef MOERT_PLACE
}

// v[i], v[i + kApart] -> their lower halves by turns, and at v[i + kApart] the upper ones.
template <int kApart>
MOERT_INLINE void interleave(VecB* v) {
  constexpr auto every = std::make_index_sequence<kVectorBytes>{};
  const VecB lower = interleave<false>(v[0], v[kApart], every), upper = interleave<true>(v[0], v[kApart], every);
  v[0] = lower, v[kApart] = upper;
}

// The codes of 8 kVectorBytes columns from one bit plane after the other, of which `left` bytes are the row's: a byte
// each, columns 128 i + 16 j and on at codes + j kVectorBytes + 16 i.
void unpack_columns(const uint8_t* bits, int64_t plane, int64_t left, int64_t planes, uint8_t* codes) {
  unpack_planes(planes, {bits, plane, smaller(left, kVectorBytes), codes, kVectorBytes, 0});
  VecB v[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) v[i] = load_vector<VecB>(codes + i * kVectorBytes);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) interleave<4>(v + i);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) interleave<2>(v + i + (i & 2));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) interleave<1>(v + 2 * i);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) store_vector(codes + i * kVectorBytes, v[i]);
}

// A row of bit-nested weights.
struct BitNestedRow {
  static constexpr float kFactor = 1;
  static constexpr int64_t kUnpacked = 8 * kVectorBytes;
  const uint8_t* bits;
  const f16* scales;
  int64_t bytes, plane;
  int planes, group_shift;
  float first, width;  // bit_nested_value(code) = first + width * code
  uint8_t codes[kUnpacked];

  BitNestedRow(const PackedRows& b, int64_t n)
      : bits(b.codes + n * row_bytes(b.packing)),
        scales(static_cast<const f16*>(b.scales) + n * groups(b.packing)),
        bytes(row_bytes(b.packing)),
        plane(b.packing.rows * bytes),
        planes(int(b.packing.planes)),
        group_shift(__builtin_ctzll(uint64_t(b.packing.group / kStep))),
        first(bit_nested_value(0, planes)),
        width(16 / float(1 << planes)) {}

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
    const int64_t byte = s * kStep / 8, column = s * kStep % kUnpacked;
    if (column == 0) unpack_columns(bits + byte, plane, bytes - byte, planes, codes);
    const uint8_t* from = codes + column / 128 * 16 + column % 128 / 16 * kVectorBytes;
#pragma GCC unroll 8
    for (int i = 0; i < kStepVectors; ++i) {
      const int at = i * kLanes<float>;
      v[i] = to_floats(widen(from + at / 16 * kVectorBytes + at % 16)) * width + first;
    }
    return widen_scale(scales[s >> group_shift]);
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
