// What packing asks of an instruction set: rows of weights to codes and back, the same bits from each of them.
#pragma once

#include "moert/bit_nested.h"
#include "moert/formats.h"

namespace moert::cpu {

// The planes of one row of bit-nested weights, the highest first.
struct PlanesOfRow {
  uint8_t* first;
  int64_t stride;  // bytes from plane to plane
};

struct FormatKernels {
  // w [columns] -> packed [row_bytes], scales and zeros [groups]; an infinite scale (mxfp4: 255) is no scale.  scratch:
  // 2 * columns codes, and (ternary) 2 * columns numbers.
  void (*quantize_row)(const Packing&, const float* w, uint8_t* scratch, uint32_t* numbers, uint8_t* packed,
                       void* scales, uint8_t* zeros);
  // codes [columns], scales and zeros [groups] -> w [columns].
  void (*dequantize_row)(const Packing&, const uint8_t* codes, const void* scales, const uint8_t* zeros, float* w);
  // Both return the index of the first bad code or byte of the row, or -1.
  int64_t (*pack_row)(const Packing&, const uint8_t* codes, uint8_t* packed);
  int64_t (*unpack_row)(const Packing&, const uint8_t* packed, uint8_t* codes);
  // w [columns] -> planes and scales [groups]; false where a scale has no float16.  scratch: `columns` codes, both.
  bool (*quantize_planes)(const BitNestedPacking&, const float* w, uint8_t* scratch, PlanesOfRow, f16* scales);
  void (*dequantize_planes)(const BitNestedPacking&, PlanesOfRow, const f16* scales, uint8_t* scratch, float* w);
};

namespace generic {
extern const FormatKernels format_kernels;
}
namespace avx2 {
extern const FormatKernels format_kernels;
}
namespace avx512 {
extern const FormatKernels format_kernels;
}

const FormatKernels& format_kernels();  // of the instruction set in use

}  // namespace moert::cpu
