// fp8 e4m3 with a float32 scale for every block of 128 x 128 weights, as DeepSeek-V3's checkpoints have them.
//
// codes [matrices, rows, row_bytes], a byte a weight, rows padded with 0 to 16 bytes; scales float32 [matrices,
// ceil(rows / 128), ceil(columns / 128)].  w = scale * e4m3(code).
#pragma once

#include <cstdint>

#include "moert/dtype.h"

namespace moert {

constexpr int64_t kFp8Block = 128;

struct Fp8Packing {
  int64_t matrices;
  int64_t rows;
  int64_t columns;
};

MOERT_HOST_DEVICE constexpr int64_t fp8_blocks(int64_t length) { return (length + kFp8Block - 1) / kFp8Block; }
MOERT_HOST_DEVICE constexpr int64_t fp8_row_bytes(int64_t columns) { return (columns + 15) / 16 * 16; }

// e4m3 of OCP's 8-bit formats: bit 7 the sign, bits 3..6 the exponent (bias 7), bits 0..2 the mantissa; no infinity,
// and 0x7f and 0xff are NaN, which no packed matrix has.
MOERT_HOST_DEVICE static inline float e4m3_to_float(uint8_t code) {
  const uint32_t sign = uint32_t(code & 0x80u) << 24, magnitude = code & 0x7fu;
  if (magnitude == 0x7fu) return bits_to_float(sign | 0x7fc00000u);
  if (magnitude < 8u) {  // subnormal: multiples of 2^-9
    const float value = float(magnitude) * 0x1p-9f;
    return sign ? -value : value;
  }
  return bits_to_float(sign | ((magnitude << 20) + (120u << 23)));
}

// The same but for NaN, where subnormal float32 are not flushed: the code's bits are those of 2^-120 of it.
MOERT_HOST_DEVICE static inline float e4m3_to_float_with_subnormals(uint32_t code) {
  return bits_to_float((code & 0x80u) << 24 | (code & 0x7fu) << 20) * 0x1p120f;
}

// The nearest, ties to even; beyond 448 it is 448.  y is not NaN.
MOERT_HOST_DEVICE static inline uint8_t to_e4m3(float y) {
  const uint32_t bits = float_to_bits(y), sign = bits >> 24 & 0x80u, magnitude = bits & 0x7fffffffu;
  if (magnitude >= 0x43e00000u) return uint8_t(sign | 0x7eu);
  if (magnitude < 0x3c800000u) {  // below 2^-6: the adder rounds to a multiple of 2^-9
    return uint8_t(sign | (float_to_bits(bits_to_float(magnitude) + 0x1p14f) - 0x46800000u));
  }
  return uint8_t(sign | ((magnitude - (120u << 23) + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20));
}

namespace cpu {

// w [matrices, rows, columns]: scale = max|w| of the block / 448, code = nearest(w / scale); a block of zeros has scale
// 0.  Throws where w is not finite.
void fp8_quantize(const Fp8Packing& packing, const float* w, int threads, uint8_t* codes, float* scales);

// Throws on NaN codes, on bytes after the last column that are not 0 and on scales that are not finite.
void fp8_dequantize(const Fp8Packing& packing, const uint8_t* codes, const float* scales, int threads, float* w);

}  // namespace cpu
}  // namespace moert
