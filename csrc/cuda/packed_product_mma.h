// Which packed weights the tensor cores take, and how rows must lie for them.
#pragma once

#include "cuda/packed_product.cuh"

namespace moert::cuda {

// What shares a scale whatever the group is.
constexpr int kSpanColumns = 32;

// Columns that a warp takes at a time.
constexpr int step_columns(Format format) { return format == Format::ternary5 ? 160 : 128; }

#if defined(MOERT_CUTLASS)
constexpr bool kPackedOnTensorCores = true;
#else
constexpr bool kPackedOnTensorCores = false;  // an emulation without CUTLASS has none
#endif

// Both depend on nothing but the weights and the dtype: a token has the same bits whatever tokens come with it.
//
// With rows as they are, or as codes; bf16 has no room for more than six planes beside a power of two.
inline bool takes_tensor_cores(const PackedMatrix& w, DType x) {
  const Packing& p = w.packing;
  const bool sixteen_bits = x == DType::bf16 || x == DType::f16;
  const bool fits = p.format == Format::ternary5     ? p.group == 0
                    : p.format == Format::bit_nested ? x == DType::f16 || p.planes <= 6
                                                     : true;
  return kPackedOnTensorCores && sixteen_bits && fits &&
         (p.format == Format::sub1 || is_aligned(w.codes, w.codes_stride));
}
inline bool takes_tensor_cores_as_codes(const PackedMatrix& w, Precision precision) {
  const Packing& p = w.packing;
  const bool fits =
      p.format == Format::ternary5 ? p.group == 0 && precision == Precision::int8 : takes(p.format, precision);
  return kPackedOnTensorCores && precision != Precision::full && fits && p.format != Format::bit_nested &&
         is_aligned(w.codes, 0);
}

constexpr ColumnOrder tensor_core_order(Format format) {
  const ColumnLie lie = format == Format::int8 || format == Format::fp8 ? ColumnLie::order
                        : format == Format::bit_nested                  ? ColumnLie::bits
                        : format == Format::ternary5                    ? ColumnLie::trits
                                                                        : ColumnLie::fours;
  return {0, step_columns(format), lie};
}
constexpr ColumnOrder code_order(Format format) {
  const bool four_bits = format == Format::int4 || format == Format::int4_asymmetric;
  const ColumnLie lie = format == Format::mxfp4 ? ColumnLie::order
                        : four_bits             ? ColumnLie::twos
                                                : tensor_core_order(format).lie;
  return {0, step_columns(format), lie};
}

// A step of a row of codes, int8 or e4m3: those of two spans after two, so that 16 bytes are what a lane multiplies of
// both, then the scales of four spans; where 128 columns or more share one, the first is.
struct CodeStep {
  int columns;

  MOERT_HOST_DEVICE constexpr int spans() const { return columns / kSpanColumns; }
  MOERT_HOST_DEVICE constexpr int code_bytes() const { return (spans() + 1) / 2 * 2 * kSpanColumns; }
  MOERT_HOST_DEVICE constexpr int bytes() const { return code_bytes() + 4 * int(sizeof(float)); }
  // Of the eight codes of lane t.
  MOERT_HOST_DEVICE constexpr int place(int span, int t) const { return span / 2 * 64 + t * 16 + span % 2 * 8; }
};

// T is bf16 or f16.
template <typename T>
void multiply_on_tensor_cores(const PackedProduct<float>& product, void* stream);
// Bit-nested and sub-1-bit weights.
template <typename T>
void multiply_terms_on_tensor_cores(const PackedProduct<float>& product, void* stream);
// x is rows of CodeStep, x_stride bytes apart.
void multiply_codes(const PackedProduct<float>& product, Precision precision, void* stream);

}  // namespace moert::cuda
