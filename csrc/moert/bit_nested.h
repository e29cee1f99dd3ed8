// Bit-nested weights: any prefix of the planes is a valid tensor of fewer bits.
//
// A group of weights has one scale, float16 of either sign, and a weight a number of `planes` bits, which halves its
// range bit by bit: w = scale * bit_nested_value(code, planes).  Without the last plane what is left is the code, one
// bit shorter, of the cell that holds both halves.  The scale belongs to any number of planes.
//
// codes [matrices, planes, rows, row_bytes]: a plane is one bit of every weight, the highest first, rows padded with 0
// to 16 bytes (128 weights), bit j of byte i is column 8 i + j.  scales float16 [matrices, rows, groups].
#pragma once

#include <cstdint>

#include "moert/formats.h"

namespace moert {

struct BitNestedPacking {
  int64_t matrices;
  int64_t rows;
  int64_t columns;
  int64_t group;   // columns that share a scale: 32, 64 or 128
  int64_t planes;  // 1 to 8, the highest bit first
};

MOERT_HOST_DEVICE constexpr int64_t row_bytes(const BitNestedPacking& p) { return row_bytes(p.columns, 128); }
MOERT_HOST_DEVICE constexpr int64_t groups(const BitNestedPacking& p) { return (p.columns + p.group - 1) / p.group; }

// What a code of so many bits stands for, in units of the scale: the middle of its cell, of 2^planes equal ones from
// -8.5 to 7.5.  So four bits are int4's code - 8, and fewer the mean of the codes that begin with them.  Exact.
MOERT_HOST_DEVICE constexpr float bit_nested_value(int32_t code, int64_t planes) {
  return float(((2 * code + 1) << (8 - planes)) - 272) / 32;
}

namespace cpu {

// Throws unless the format has this group and number of planes.
void check_packing(const BitNestedPacking& packing);

// By the rounding rule of docs/formats.md to codes [matrices, planes, rows, row_bytes] and scales [matrices, rows,
// groups].  Throws where w is not finite or a scale has no float16.
void bit_nested_quantize(const BitNestedPacking& packing, const float* w, int threads, uint8_t* codes, f16* scales);

// Throws on bits after the last column and on scales that are not finite.
void bit_nested_dequantize(const BitNestedPacking& packing, const uint8_t* codes, const f16* scales, int threads,
                           float* w);

}  // namespace cpu
}  // namespace moert
