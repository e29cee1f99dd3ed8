// Packed rows as the kernels read them: where each row's codes are, and its scales and zeros as vectors.
#pragma once

#include "cpu/packed_activations.h"
#include "cpu/packed_bits.h"

namespace moert::cpu {
namespace {

// 2^(byte - 128), from 2^(byte - 127), of which only that of byte 0 is subnormal.
MOERT_INLINE VecF half_e8m0(const uint8_t* bytes) {
#if defined(__AVX512F__)
  const VecI wide = bit_cast_vector<VecI>(_mm512_cvtepu8_epi32(load_vector<__m128i>(bytes)));
#elif defined(__AVX2__)
  const VecI wide =
      bit_cast_vector<VecI>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes))));
#else
  VecI wide;
  for (int i = 0; i < kLanes<float>; ++i) wide[i] = bytes[i];
#endif
  return bit_cast_vector<VecF>(max(wide << 23, splat(0x00400000))) * 0.5f;
}

// f16 scales, or a part of them where codes are integers by being doubled (mxfp4, whose scales are e8m0) or in other
// units (bit_nested); `first`, `n`: of one row's groups.
MOERT_INLINE void widen_scales(const PackedRows& b, int64_t row, int64_t first, int64_t n, float* out) {
  const int64_t at = row * groups(b.packing) + first;
  if (b.float_scales) {
    std::memcpy(out, static_cast<const float*>(b.scales) + at, size_t(n) * sizeof(float));
    return;
  }
  if (b.packing.format != Format::mxfp4) {
    const f16* scales = static_cast<const f16*>(b.scales) + at;
    const float unit = b.packing.format == Format::bit_nested ? float(bit_nested_unit(b.packing.planes)) / 32 : 1;
    for_vectors<float>(n, [&](int64_t i, auto count) { store(out + i, load(scales + i, count) * unit, count); });
    return;
  }
  const uint8_t* scales = static_cast<const uint8_t*>(b.scales) + at;
  for_vectors<float>(n, [&](int64_t i, auto count) {
    uint8_t part[kLanes<float>] = {};
    std::memcpy(part, scales + i, size_t(count));
    store(out + i, half_e8m0(part), count);
  });
}

// kBias - zero in each of four bytes.
template <typename Code>
MOERT_INLINE void widen_zeros(const PackedRows& b, int64_t row, int64_t first, int64_t n, int32_t* out) {
  const uint8_t* zeros = b.zeros + row * groups(b.packing) + first;
  for (int64_t i = 0; i < n; ++i) out[i] = int32_t(uint8_t(Code::kBias - zeros[i]) * 0x01010101u);
}

// The five values of every byte of ternary5.
struct Trits {
  int8_t of_byte[256][8] = {};
  constexpr Trits() {
    for (int byte = 0; byte < 256; ++byte)
      for (int j = 0; j < 5; ++j) of_byte[byte][j] = int8_t(FiveTritsAByte::code(uint8_t(byte), j) - 1);
  }
};
constexpr Trits kTrits;

// The packed bytes of some rows: in place, ternary5 unpacked to int8, or bit planes to bytes.
struct CodeRows {
  const uint8_t* data;
  int64_t stride;  // also the bytes of a row
  int64_t vector;  // bytes from one of a code's kVectors to the next
};

// The kVectors vectors of a code, the row's last ones (with kLast) as load_last does.
template <typename Code, bool kLast>
MOERT_INLINE void load_codes(const uint8_t* p, int64_t vector, int64_t left, VecB* out) {
#pragma GCC unroll 8
  for (int i = 0; i < Code::kVectors; ++i)
    out[i] = kLast ? load_last(p + i * vector, left) : load_vector<VecB>(p + i * vector);
}

// Room for so many unpacked rows.
constexpr int64_t kUnpackedRows = 16;

MOERT_INLINE CodeRows code_rows(const PackedRows& b, Precision precision, int64_t row, int64_t n, char* scratch) {
  const int64_t bytes = row_bytes(b.packing);
  const uint8_t* data = b.codes + row * bytes;
  if (!unpacks_first(b.packing, precision)) return {data, bytes, b.packing.rows * bytes};
  const int64_t columns = b.packing.columns, stride = round_up(columns, 16);
  uint8_t* out = reinterpret_cast<uint8_t*>(scratch);
  for (int64_t r = 0; r < n; ++r, data += bytes) {
    uint8_t* q = out + r * stride;
    // What goes past the row is overwritten by the next one.
    for (int64_t i = 0; i < columns; i += 5) std::memcpy(q + i, kTrits.of_byte[data[i / 5]], 8);
    std::memset(q + columns, 0, size_t(stride - columns));
  }
  return {out, stride, 0};
}

// Rows of bit planes as bytes of codes, a vector of each of the eight columns of a byte.
MOERT_INLINE CodeRows unpacked_rows(const PackedRows& b, int64_t row, int64_t n, char* scratch) {
  const int64_t bytes = row_bytes(b.packing), all = n * bytes;
  // The last step of the last row reads to its end: whatever lies there times zeros, integers all.
  const int64_t apart = round_up(all, kVectorBytes) + kVectorBytes;
  uint8_t* codes = reinterpret_cast<uint8_t*>(scratch);
  unpack_planes(b.packing.planes, {b.codes + row * bytes, b.packing.rows * bytes, all, codes, apart, kVectorBytes});
  return {codes, bytes, apart};
}

// Lane l of a step belongs to group (l * columns of a lane) >> shift, counted from first_group.
template <typename Code>
MOERT_INLINE VecI group_of_lane(int shift) {
  VecI lanes;
  for (int i = 0; i < kLanes<int32_t>; ++i) lanes[i] = int32_t(int64_t(i * 4 * Code::kPlanes) >> shift);
  return lanes;
}

}  // namespace
}  // namespace moert::cpu
