// Bit-nested weights (D2MoE's matryoshka quantisation): any prefix of the planes is a valid tensor of fewer bits.
//
// Level 1 has `base` bits a weight with a scale and a zero a group; each further level adds one bit, + or - that
// level's scale:  w_k = (q - zero) * scale_1 + sum of (2 bit_i - 1) * scale_i over i = 2..k, added in this order in
// float32.
//
// codes [matrices, planes, rows, row_bytes]: a plane is one bit of every weight, rows padded with 0 to 16 bytes (128
// weights), bit j of byte i is column 8 i + j.  The base's planes come first, its lowest bit first, then a plane a
// level. scales float16 [matrices, levels, rows, groups]; zeros uint8 [matrices, rows, groups].
#pragma once

#include <cstdint>

#include "moert/dtype.h"

namespace moert {

struct BitNestedPacking {
  int64_t matrices;
  int64_t rows;
  int64_t columns;
  int64_t group;   // columns that share their scales: 32, 64 or 128
  int64_t base;    // bits of level 1
  int64_t levels;  // of which the last has base + levels - 1 bits
};

MOERT_HOST_DEVICE constexpr int64_t planes(const BitNestedPacking& p) { return p.base + p.levels - 1; }
MOERT_HOST_DEVICE constexpr int64_t row_bytes(const BitNestedPacking& p) { return (p.columns + 127) / 128 * 16; }
MOERT_HOST_DEVICE constexpr int64_t groups(const BitNestedPacking& p) { return (p.columns + p.group - 1) / p.group; }

namespace cpu {

// Throws unless the format has this group, base and number of levels (at most 8 bits).
void check_packing(const BitNestedPacking& packing);

// By the rounding rule of docs/formats.md.  Throws where w is not finite or a scale has no float16.
void bit_nested_quantize(const BitNestedPacking& packing, const float* w, int threads, uint8_t* codes, f16* scales,
                         uint8_t* zeros);

// Throws on bits after the last column, on scales that are not finite and on zeros that are no code of the base.
void bit_nested_dequantize(const BitNestedPacking& packing, const uint8_t* codes, const f16* scales,
                           const uint8_t* zeros, int threads, float* w);

}  // namespace cpu
}  // namespace moert
