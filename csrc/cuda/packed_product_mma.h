// Which packed weights the tensor cores take, and how rows must lie for them.
#pragma once

#include "cuda/packed_product.cuh"

namespace moert::cuda {

// Columns that a warp takes at a time, and of those what shares a scale whatever the group is.
constexpr int kStepColumns = 128, kSpanColumns = 32;

constexpr bool has_fragments(Format format) {
  return format == Format::int8 || format == Format::int4 || format == Format::int4_asymmetric ||
         format == Format::mxfp4 || format == Format::ternary2 || format == Format::fp8;
}

#if defined(MOERT_CUTLASS)
constexpr bool kPackedOnTensorCores = true;
#else
constexpr bool kPackedOnTensorCores = false;  // an emulation without CUTLASS has none
#endif

// Depends on nothing but the weights and the dtype: a token has the same bits whatever tokens come with it.
inline bool takes_tensor_cores(const PackedMatrix& w, DType x) {
  return kPackedOnTensorCores && (x == DType::bf16 || x == DType::f16) && has_fragments(w.packing.format) &&
         is_aligned(w.codes, 0);
}

constexpr ColumnOrder tensor_core_order(Format format) {
  return {0, kStepColumns, format != Format::int8 && format != Format::fp8};
}

// T is bf16 or f16.
template <typename T>
void multiply_on_tensor_cores(const PackedProduct<float>& product, void* stream);

}  // namespace moert::cuda
