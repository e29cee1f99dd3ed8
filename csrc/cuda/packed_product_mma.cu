// Every kernel over rows of bf16 or f16 and formats of one scale a span: six decoders, two elements, two shapes.
#include "cuda/packed_product_floats.cuh"

namespace moert::cuda {

template <typename T>
void multiply_on_tensor_cores(const PackedProduct<float>& p, void* stream) {
  const auto with = [&](auto codes) {
    using Codes = decltype(codes);
    multiply_mma<Codes, FloatRows<Codes, T>>(p, stream);
  };
  switch (p.w.matrix.packing.format) {
    case Format::int8:
      return with(Int8Fragments{});
    case Format::int4:
    case Format::int4_asymmetric:
      return with(Int4Fragments{});
    case Format::mxfp4:
      return with(Mxfp4Fragments{});
    case Format::ternary2:
      return with(Ternary2Fragments{});
    case Format::ternary5:
      return with(Ternary5Fragments{});
    case Format::fp8:
      return with(Fp8Fragments{});
    default:
      return multiply_terms_on_tensor_cores<T>(p, stream);
  }
}

template void multiply_on_tensor_cores<bf16>(const PackedProduct<float>&, void*);
template void multiply_on_tensor_cores<f16>(const PackedProduct<float>&, void*);

}  // namespace moert::cuda
