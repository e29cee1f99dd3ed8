// What the drivers of quantized experts ask of an instruction set: rows of int8 activations, products of such rows with
// packed weights, and packed weights as float32 or
// bfloat16.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/gemm_isa.h"
#include "moert/fused_experts_quantized.h"

namespace moert::cpu {

// Some rows of one expert: the pointers are those of the first.
struct PackedRows {
  Packing packing;
  const uint8_t* codes;
  const void* scales;
  const uint8_t* zeros;
  int64_t row = 0;            // of the first in its matrix; fp8: `scales` are the whole matrix's
  int64_t size = 0;           // sub1: the codewords of the matrix, which begin at `codes`
  bool float_scales = false;  // of rows: float32, whatever the format has
};

// Rows as quantize_row leaves them, `stride` bytes apart, aligned to 64; row r is the stored row index[r].
struct QuantizedRows {
  const char* data;
  int64_t stride;
  const int32_t* index = nullptr;
};

// c[m, n] = a[m] . b[n], the float32 product of the quantized row and the dequantized weights.
struct PackedTile {
  int64_t M, N;
  QuantizedRows a;
  PackedRows b;
  Precision precision;
  float* c;                      // rows kTileColumns apart
  char* scratch;                 // packed_scratch(b.packing, precision) bytes, aligned to 64
  bool batch_invariant = false;  // the bits of a row of c are the same whatever M is
  int64_t same_a = 0;            // as GemmTile's: calls with the same number have the same a and M
};

// c[m, n] = x[m] . w[n] for few rows of float32, the weights made floats in registers.
constexpr int64_t kFewRows = 4;
constexpr int64_t kFewPadding = 128;  // columns of zeros that a row of x has at least behind its own
struct FewRows {
  int64_t M, N;
  float* x;  // rows `stride` apart; they may come back in another order of columns
  int64_t stride;
  PackedRows b;
  float* c;          // rows kTileColumns apart
  uint8_t* scratch;  // few_scratch(b.packing.columns) bytes
};
constexpr int64_t few_scratch(int64_t columns) { return 2 * columns + 128; }  // sub1: 4 rows, half a byte a column

// For dot products and panels; for tile registers, which take so many bytes of a row's codes at a time: sums, rows of
// x, whose steps may be padded by up to 320 columns, and 32 rows of codes.
constexpr int64_t kTileBytes = 4096;
constexpr int64_t packed_scratch(int64_t columns) {
  const int64_t others = 32 * columns + (int64_t(512) << 10), bytes = std::min(columns + 320, kTileBytes);
  return (std::max(others, kTileRows * (kTileColumns * 4 + bytes) + 32 * (bytes + 64)) + 63) / 64 * 64;
}

// Rows of groups that become int8 with a scale a row, so many at a time, and what they need behind packed_scratch:
// codes, the scales of the rows and of their groups, the factors (and zeros) of one row.
constexpr bool requantizes(const Packing& p, Precision precision) {
  return precision == Precision::int8_weights && p.group != 0 && takes(p.format, precision);
}
constexpr int64_t kRequantizedRows = 64, kRequantizedBehind = 16;  // the latter: behind scales and factors
constexpr int64_t requantized_codes(int64_t columns) { return kRequantizedRows * ((columns + 15) / 16 * 16) + 128; }
constexpr int64_t packed_scratch(const Packing& p, Precision precision) {
  const int64_t scales = 4 * (kRequantizedRows * (1 + groups(p)) + kRequantizedBehind),
                factors = 4 * (groups(p) + kRequantizedBehind);
  return packed_scratch(p.columns) + (requantizes(p, precision) ? requantized_codes(p.columns) + scales + factors : 0);
}

constexpr int64_t kBf16Step = 32;  // columns that a tile register holds of a row

struct PackedGemmKernels {
  // Bytes of one quantized row, a multiple of 64.
  int64_t (*quantized_row_bytes)(const Packing&, Precision);
  // x [columns].  NaN or infinity makes the scale NaN.
  void (*quantize_row)(const float* x, const Packing&, Precision, char* row);
  void (*gemm)(const PackedTile&);
  // Rows [N, columns], `stride` elements apart.
  void (*dequantize)(const PackedRows&, int64_t N, float* out, int64_t stride);
  // The same rounded to bfloat16, which is written in steps of kBf16Step columns; `row` is [columns] to work in.
  void (*dequantize_bf16)(const PackedRows&, int64_t N, bf16* out, int64_t stride, float* row);
  // False, and nothing done, where the format has no such kernel.
  bool (*few)(const FewRows&);
};

namespace generic {
extern const PackedGemmKernels packed_gemm_kernels;
}
namespace avx2 {
extern const PackedGemmKernels packed_gemm_kernels;
}
namespace avx512 {
extern const PackedGemmKernels packed_gemm_kernels;
}
namespace avx512_vnni {
extern const PackedGemmKernels packed_gemm_kernels;
}

namespace amx {
void packed_gemm(const PackedTile&);
void dequantize_bf16(const PackedRows&, int64_t N, bf16* out, int64_t stride, float* row);
}  // namespace amx

const PackedGemmKernels& packed_gemm_kernels();

}  // namespace moert::cpu
