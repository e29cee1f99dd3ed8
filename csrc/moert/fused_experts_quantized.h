// The whole expert FFN over packed weights (moert/formats.h, docs/quantized.md).
#pragma once

#include <cstdint>

#include "moert/formats.h"
#include "moert/fused_experts.h"

namespace moert {

// The type that the rows of both products have.  bfloat16, on a CPU alone: the dequantized weights are rounded to it,
// too.  int8: a scale a token, max|x| / 127; int8_group32: a scale every 32 columns.  Products of integers are exact;
// their sums are float32 across scales.  fp8_group128, over fp8 weights alone: e4m3 and a scale every 128 columns,
// max|x| / 448.  int8_group160, on a CPU alone: a scale every 160 columns, which are whole bytes of ternary5.
// int8_weights, over int8, int4 and mxfp4 on a CPU alone: rows as int8 has them, and weights that have groups become
// int8 with a scale a row, the largest that its groups can hold / 127, so that sums of whole rows are integers.
enum class Precision : int32_t { full, bfloat16, int8, int8_group32, fp8_group128, int8_weights, int8_group160 };
constexpr Precision kPrecisions[] = {Precision::full,         Precision::bfloat16,     Precision::int8,
                                     Precision::int8_group32, Precision::fp8_group128, Precision::int8_weights,
                                     Precision::int8_group160};

constexpr const char* name(Precision precision) {
  constexpr const char* kNames[] = {"full",         "bfloat16",     "int8",         "int8_group32",
                                    "fp8_group128", "int8_weights", "int8_group160"};
  return kNames[int(precision)];
}

// One scale a row of x.
constexpr bool is_int8_row(Precision p) { return p == Precision::int8 || p == Precision::int8_weights; }
constexpr bool is_int8(Precision p) {
  return is_int8_row(p) || p == Precision::int8_group32 || p == Precision::int8_group160;
}
constexpr bool is_on_cpu_alone(Precision p) {
  return p == Precision::bfloat16 || p == Precision::int8_weights || p == Precision::int8_group160;
}

// Whether weights of this format can be multiplied by such rows.
constexpr bool takes(Format format, Precision precision) {
  if (precision == Precision::full || precision == Precision::bfloat16) return true;
  if (precision == Precision::fp8_group128) return format == Format::fp8;
  if (precision == Precision::int8_weights) return int(format) <= int(Format::mxfp4);
  return int(format) < kRowFormats || format == Format::bit_nested;
}

// The scale of codes up to `largest` for values up to x, of which these are the bits without the sign; NaN where that
// is not finite, 0 where it is below 2^-119 (products would be subnormal).
MOERT_HOST_DEVICE static inline float row_scale(uint32_t bits, float largest) {
  if (bits >= 0x7f800000u) return bits_to_float(0x7fc00000u);
  const float most = bits_to_float(bits);
  return most < 0x1p-119f ? 0 : most / largest;
}
constexpr float kLargestInt8 = 127, kLargestE4m3 = 448;

constexpr bool is_ternary(Format format) { return format == Format::ternary2 || format == Format::ternary5; }

// int8 rows where the error of the whole is at most 1.5 times that of the weights alone (docs/quantized.md): weights of
// 8 bits in small groups are too exact for them.  A byte of ternary5 has columns of two groups of 32, which takes
// longer (docs/quantized.md), but not of 160.  planes: of bit_nested.
constexpr Precision default_precision(Format format, int64_t group, int64_t planes) {
  if (format == Format::ternary5 && group == 0) return Precision::int8_group160;
  if (!takes(format, Precision::int8)) return Precision::full;
  const bool eight_bits = format == Format::int8 || (format == Format::bit_nested && planes == 8);
  return eight_bits && (group == 32 || group == 64) ? Precision::full : Precision::int8_group32;
}
constexpr Precision default_precision(const Packing& p) { return default_precision(p.format, p.group, p.planes); }

// The finer one of two matrices.
constexpr Precision default_precision(const Packing& w1, const Packing& w2) {
  const Precision a = default_precision(w1), b = default_precision(w2);
  if (a == Precision::full || b == Precision::full) return Precision::full;
  return a == Precision::int8_group32 ? a : b;
}

// Longer rows could overflow a sum of int8 products.
constexpr int64_t kMaxInt8Columns = 1 << 17;

// The matrices of all experts.  In fp8, bit_nested and sub1 the arrays are those of their headers.
struct PackedMatrix {
  Packing packing;
  const uint8_t* codes;             // [E, rows, row_bytes]; sub1: uint16_t of all experts
  const void* scales;               // [E, rows, groups]; sub1: bfloat16 low and high [E, rows, 2]
  const uint8_t* zeros;             // likewise, or null; sub1: int32_t row_ptr [E, rows + 1]
  int64_t codes_stride = 0;         // bit_nested: bytes from an expert's planes to the next one's; some may not be read
  const int64_t* starts = nullptr;  // sub1 on a CPU: [E + 1], the codeword at which each expert begins
  int64_t size = 0;                 // sub1 on a GPU: codewords of all experts; more are not read
};

struct QuantizedExperts {
  PackedMatrix w1;       // rows [2I] gate, then up (or [I]); columns [H]
  PackedMatrix w2;       // rows [H]; columns [I]
  ExpertWeights floats;  // the sizes, biases and choices; its matrices are not read
};

namespace cpu {

// Rows an expert on average from which those of bfloat16 are faster than those of the precision that the format has by
// default; 0: never, as without tile registers (Isa::amx).  ternary: both matrices are.
int64_t bf16_rows(Precision by_format, bool ternary);

// What "auto" is for `rows` rows of E experts: bfloat16 where that is faster, else what the format says.  Under
// batch_invariant the choice does not depend on the rows.
Precision auto_precision(Precision by_format, bool ternary, int64_t rows, int64_t E, bool batch_invariant);

// As fused_experts.  float64 x has full activations only.
void fused_experts_quantized(const RoutedRows& tokens, const QuantizedExperts& experts, Precision precision,
                             int64_t threads, void* y);

// dx [T, H] in x's dtype and dweights [T, k]; either may be null.  The gradient is that of full activations.
void fused_experts_quantized_backward(const Rows& dy, const RoutedRows& tokens, const QuantizedExperts& experts,
                                      int64_t threads, void* dx, void* dweights);

}  // namespace cpu

// The same on the current device, with codes and scales of x that are those of a CPU; ordered by `stream` (a
// cudaStream_t); every pointer is the device's.  `workspace` is as many bytes of the device as the first function says,
// aligned to 256.  The bits of a row of y do not depend on the other rows.  The first call over sub1 weights on a
// device brings it their dictionary and waits for that; it can't be captured.
namespace cuda {

int64_t fused_experts_quantized_workspace(const RoutedRows& tokens, const QuantizedExperts& experts,
                                          Precision precision);

void fused_experts_quantized(const RoutedRows& tokens, const QuantizedExperts& experts, Precision precision,
                             void* workspace, void* stream, void* y);

// Of the gradients there are dx and dweights.  Some experts at a time are dequantized, to x's dtype; what lies between
// the products is rounded to that, too.
int64_t fused_experts_quantized_backward_workspace(const RoutedRows& tokens, const QuantizedExperts& experts,
                                                   const ExpertGradients& gradients);

void fused_experts_quantized_backward(const Rows& dy, const RoutedRows& tokens, const QuantizedExperts& experts,
                                      void* workspace, void* stream, const ExpertGradients& gradients);

}  // namespace cuda
}  // namespace moert
