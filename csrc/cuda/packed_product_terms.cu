// Every kernel over rows of bf16 or f16 and formats whose spans take more than a load: bit planes, codewords.
#include "cuda/packed_product_floats.cuh"
#include "cuda/packed_product_terms.cuh"

namespace moert::cuda {

template <typename T>
void multiply_terms_on_tensor_cores(const PackedProduct<float>& p, void* stream) {
  if (p.w.matrix.packing.format == Format::bit_nested)
    return multiply_mma<BitNestedFragments, FloatRows<BitNestedFragments, T>, WideOneTile>(p, stream);
  MOERT_CHECK(p.w.matrix.packing.format == Format::sub1,
              "packed weights must have a format that tensor cores take, got ", cpu::name(p.w.matrix.packing.format));
  multiply_mma<Sub1Fragments, FloatRows<Sub1Fragments, T>, WideOneTile>(p, stream);
}

template void multiply_terms_on_tensor_cores<bf16>(const PackedProduct<float>&, void*);
template void multiply_terms_on_tensor_cores<f16>(const PackedProduct<float>&, void*);

}  // namespace moert::cuda
