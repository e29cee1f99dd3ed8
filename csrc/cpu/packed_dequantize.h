// Packed rows as float32, for products with full activations.
#pragma once

#include "cpu/packed_scales.h"

namespace moert::cpu {
namespace {

constexpr int64_t kChunk = 320;  // columns: whole bytes of every format, whole groups of 32

// The codes of kChunk columns.
template <typename Byte>
MOERT_INLINE void unpack_chunk(const uint8_t* bytes, int8_t* out) {
  for (int64_t i = 0; i < kChunk / Byte::kCodes; ++i)
    for (int j = 0; j < Byte::kCodes; ++j) out[i * Byte::kCodes + j] = int8_t(Byte::code(bytes[i], j));
}

MOERT_INLINE void unpack_chunk_of(Format format, const uint8_t* bytes, int8_t* out) {
  switch (format) {
    case Format::int8:
      return unpack_chunk<OneAByte>(bytes, out);
    case Format::ternary2:
      return unpack_chunk<FourTritsAByte>(bytes, out);
    case Format::ternary5:
      for (int64_t i = 0; i < kChunk / 5; ++i)
        for (int j = 0; j < 5; ++j) out[5 * i + j] = int8_t(kTrits.of_byte[bytes[i]][j] + 1);
      return;
    default:
      return unpack_chunk<TwoAByte>(bytes, out);
  }
}

typedef int8_t Codes __attribute__((vector_size(kLanes<float>)));

// scale * (code - zero); a whole vector of codes is read.
MOERT_INLINE void chunk_to_floats(const int8_t* codes, int64_t n, float scale, float zero, float* out) {
  for_vectors<float>(n, [&](int64_t i, auto count) {
    Codes part;
    std::memcpy(&part, codes + i, sizeof part);
    const VecI q = __builtin_convertvector(part, VecI);
    store(out + i, (to_floats(q) - zero) * scale, count);
  });
}

void dequantize_rows(const PackedRows& b, int64_t N, float* out, int64_t stride) {
  const Packing& p = b.packing;
  const int64_t bytes = row_bytes(p), unit = weights_per_block(p.format) / 16;  // columns a byte
  const int64_t group = p.group ? p.group : p.columns;
  for (int64_t n = 0; n < N; ++n) {
    const uint8_t* row = b.codes + n * bytes;
    for (int64_t column = 0; column < p.columns; column += kChunk) {
      const int64_t columns = smaller(kChunk, p.columns - column), left = bytes - column / unit;
      uint8_t part[kChunk] = {};
      int8_t codes[kChunk + 16] = {};
      std::memcpy(part, row + column / unit, size_t(smaller(left, kChunk / unit)));
      unpack_chunk_of(p.format, part, codes);
      if (p.format == Format::mxfp4)  // twice its values, more 12; widen_scales halves the scale
        for (int8_t& code : codes) code = int8_t(kE2m1[code]);
      for (int64_t i = 0; i < columns;) {
        const int64_t g = (column + i) / group, end = smaller(columns, (g + 1) * group - column);
        float scale;
        widen_scales(b, n, g, 1, &scale);
        const int zero = p.format == Format::int4    ? 8
                         : p.format == Format::mxfp4 ? 12
                         : p.format == Format::int8  ? 0
                         : b.zeros                   ? b.zeros[n * groups(p) + g]
                                                     : 1;
        chunk_to_floats(codes + i, end - i, scale, float(zero), out + n * stride + column + i);
        i = end;
      }
    }
  }
}

}  // namespace
}  // namespace moert::cpu
