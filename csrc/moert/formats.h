// Quantized weights, bit by bit: the one definition that packers, kernels and checkpoints read (docs/formats.md).
//
// A weight matrix is w [rows, columns]; the rows of one expert follow each other.  Its codes are bytes
// [rows, row_bytes]: each row is a whole number of 16-byte blocks, so that a kernel loads full vectors and never reads
// past a row.  Codes lie in column order, and what a row has after its last column is 0.  Scales (and zeros) are arrays
// of their own, [rows, groups]; the last group of a row may be shorter.
//
// What does not fit this frame has a header of its own: blocks over rows too in fp8.h, planes of bits in bit_nested.h,
// codewords of many weights in sub1.h.
#pragma once

#include <cstdint>

#include "moert/dtype.h"

namespace moert {

// How a byte holds codes: kCodes of them, each below kLimit; code(byte, j) is the j-th in column order.
struct OneAByte {  // int8 as its two's complement
  static constexpr int kCodes = 1;
  static constexpr int kLimit = 256;
  MOERT_HOST_DEVICE static constexpr uint8_t encode(const uint8_t* codes) { return codes[0]; }
  MOERT_HOST_DEVICE static constexpr uint8_t code(uint8_t byte, int) { return byte; }
};

struct TwoAByte {  // bits 0..3 the even column, bits 4..7 the odd one
  static constexpr int kCodes = 2;
  static constexpr int kLimit = 16;
  MOERT_HOST_DEVICE static constexpr uint8_t encode(const uint8_t* codes) { return uint8_t(codes[0] | codes[1] << 4); }
  MOERT_HOST_DEVICE static constexpr uint8_t code(uint8_t byte, int j) { return uint8_t(byte >> 4 * j & 15); }
};

struct FourTritsAByte {  // bits 2j, 2j+1: code j, never 3
  static constexpr int kCodes = 4;
  static constexpr int kLimit = 3;
  MOERT_HOST_DEVICE static constexpr uint8_t encode(const uint8_t* codes) {
    return uint8_t(codes[0] | codes[1] << 2 | codes[2] << 4 | codes[3] << 6);
  }
  MOERT_HOST_DEVICE static constexpr uint8_t code(uint8_t byte, int j) { return uint8_t(byte >> 2 * j & 3); }
};

// ceil(256 v / 243) of v = 81 c0 + 27 c1 + 9 c2 + 3 c3 + c4: the byte is v / 243 as a fraction of 256, so that times 3
// the carry is c0 and the low byte the fraction for c1.
struct FiveTritsAByte {
  static constexpr int kCodes = 5;
  static constexpr int kLimit = 3;
  MOERT_HOST_DEVICE static constexpr uint8_t encode(const uint8_t* codes) {
    int v = 0;
    for (int j = 0; j < kCodes; ++j) v = 3 * v + codes[j];
    return uint8_t((256 * v + 242) / 243);
  }
  MOERT_HOST_DEVICE static constexpr uint8_t code(uint8_t byte, int j) {
    int fraction = byte;
    for (int i = 0; i < j; ++i) fraction = 3 * fraction & 255;
    return uint8_t(3 * fraction >> 8);
  }
};

// The unit of a row of codes.
template <typename Byte>
struct CodeBlock {
  static constexpr int kWeights = 16 * Byte::kCodes;
  uint8_t bytes[16];  // weight j of the block: Byte::code(bytes[j / kCodes], j % kCodes)
};
using Int8Block = CodeBlock<OneAByte>;            // 16 weights
using Int4Block = CodeBlock<TwoAByte>;            // 32 weights
using Mxfp4Block = CodeBlock<TwoAByte>;           // 32 weights: one scale
using Ternary2Block = CodeBlock<FourTritsAByte>;  // 64 weights, 2 bits each
using Ternary5Block = CodeBlock<FiveTritsAByte>;  // 80 weights, 1.6 bits each
static_assert(sizeof(Int8Block) == 16 && sizeof(Int4Block) == 16 && sizeof(Mxfp4Block) == 16);
static_assert(sizeof(Ternary2Block) == 16 && sizeof(Ternary5Block) == 16 && alignof(Ternary5Block) == 1);
static_assert(Mxfp4Block::kWeights == 32 && Ternary2Block::kWeights == 64 && Ternary5Block::kWeights == 80);

// The formats whose scales belong to groups within a row.  w = scale * (code - zero), but mxfp4: scale * e2m1(code).
enum class Format : int32_t {
  int8,             // Int8Block, code as signed; scale f16; zero 0
  int4,             // Int4Block; scale f16, of either sign; zero 8
  int4_asymmetric,  // Int4Block; scale f16; zero uint8 [rows, groups], at most 15
  mxfp4,            // Mxfp4Block; scale e8m0; groups of 32
  ternary2,         // Ternary2Block; scale f16; zero 1
  ternary5,         // Ternary5Block; scale f16; zero 1
  // What quantized experts multiply from as well; pack, unpack, quantize and dequantize below do not know them.
  fp8,         // fp8.h
  bit_nested,  // bit_nested.h
  sub1,        // sub1.h
};
constexpr int kRowFormats = 6, kFormats = 9;

// The shape of a packed matrix, and with it the size of every array.
struct Packing {
  Format format;
  int64_t rows;
  int64_t columns;
  int64_t group;       // columns that share a scale; 0: the whole row (int8, ternary)
  int64_t planes = 0;  // of bit_nested
};

MOERT_HOST_DEVICE constexpr int64_t weights_per_block(Format format) {
  switch (format) {
    case Format::int8:
    case Format::fp8:
      return Int8Block::kWeights;
    case Format::ternary2:
      return Ternary2Block::kWeights;
    case Format::ternary5:
      return Ternary5Block::kWeights;
    case Format::bit_nested:
      return 128;  // of one plane
    default:
      return Int4Block::kWeights;
  }
}
MOERT_HOST_DEVICE constexpr int64_t row_bytes(int64_t columns, int64_t weights_per_block) {
  return (columns + weights_per_block - 1) / weights_per_block * 16;
}
MOERT_HOST_DEVICE constexpr int64_t row_bytes(const Packing& p) {
  return row_bytes(p.columns, weights_per_block(p.format));
}
MOERT_HOST_DEVICE constexpr int64_t groups(const Packing& p) {
  return p.group == 0 ? 1 : (p.columns + p.group - 1) / p.group;
}
MOERT_HOST_DEVICE constexpr int64_t scale_bytes(Format format) { return format == Format::mxfp4 ? 1 : 2; }
MOERT_HOST_DEVICE constexpr bool has_zeros(Format format) { return format == Format::int4_asymmetric; }
MOERT_HOST_DEVICE constexpr int64_t total_bytes(const Packing& p) {
  return p.rows * (row_bytes(p) + groups(p) * (scale_bytes(p.format) + int64_t(has_zeros(p.format))));
}

// e2m1 of OCP's Microscaling formats: bit 3 the sign, bits 1..2 the exponent (bias 1), bit 0 the mantissa:
// 0, 0.5, 1, 1.5, 2, 3, 4, 6.
MOERT_HOST_DEVICE static inline float e2m1_to_float(uint32_t code) {
  const uint32_t exponent = code >> 1 & 3u, mantissa = code & 1u;
  const float magnitude = exponent == 0 ? 0.5f * float(mantissa) : float((2u + mantissa) << exponent) * 0.25f;
  return code & 8u ? -magnitude : magnitude;
}

// The same in three operations, where subnormal float32 are not flushed: the code's bits are those of 2^-126 of it.
MOERT_HOST_DEVICE static inline float e2m1_to_float_with_subnormals(uint32_t code) {
  return bits_to_float((code & 8u) << 28 | (code & 7u) << 22) * 0x1p126f;
}

// e8m0: 2^(byte - 127); 255 is NaN, which no packed matrix has.
MOERT_HOST_DEVICE static inline float e8m0_to_float(uint8_t byte) {
  return bits_to_float(byte == 0 ? 0x00400000u : byte == 255 ? 0x7fc00000u : uint32_t(byte) << 23);
}

namespace cpu {

const char* name(Format format);

// Throws unless the format is one of the first kRowFormats and has this group size.
void check_packing(const Packing& packing);

// codes [rows, columns], one a byte, to packed [rows, row_bytes] and back, both bit-exact.  packing.group is not read.
// A code that the format does not have, here or in the packed bytes, throws; so do bits after the last column.
void pack_codes(const Packing& packing, const uint8_t* codes, int threads, uint8_t* packed);
void unpack_codes(const Packing& packing, const uint8_t* packed, int threads, uint8_t* codes);

// w [rows, columns] by the rounding rule of docs/formats.md to packed [rows, row_bytes], scales [rows, groups] of
// scale_bytes each, zeros [rows, groups] (null where the format has none).  Throws where w is not finite or a scale has
// no f16.
void quantize(const Packing& packing, const float* w, int threads, uint8_t* packed, void* scales, uint8_t* zeros);

// The way back, exact but for mxfp4 beyond float32's range.  Throws on scales that are not finite, on zeros above 15
// and on what unpack_codes refuses.
void dequantize(const Packing& packing, const uint8_t* packed, const void* scales, const uint8_t* zeros, int threads,
                float* w);

}  // namespace cpu
}  // namespace moert
