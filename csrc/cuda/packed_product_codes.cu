// Every kernel over rows of codes: of int8 four decoders of scales a span and three of one a row, and e4m3; two shapes.
#include "cuda/packed_product_codes.cuh"

namespace moert::cuda {

void multiply_codes(const PackedProduct<float>& p, Precision precision, void* stream) {
  const bool whole = p.w.groups == 1 && p.w.matrix.packing.group == 0 && precision == Precision::int8;
  const auto spans = [&](auto codes) {
    using Codes = decltype(codes);
    multiply_mma<Codes, Int8Rows<Codes, false>>(p, stream);
  };
  const auto rows = [&](auto codes) {
    using Codes = decltype(codes);
    multiply_mma<Codes, Int8Rows<Codes, true>>(p, stream);
  };
  switch (p.w.matrix.packing.format) {
    case Format::int8:
      return whole ? rows(Int8Fragments{}) : spans(Int8Fragments{});
    case Format::int4:
    case Format::int4_asymmetric:
      return spans(Int4Fragments{});
    case Format::mxfp4:
      return spans(Mxfp4Fragments{});
    case Format::ternary2:
      return whole ? rows(Ternary2Fragments{}) : spans(Ternary2Fragments{});
    case Format::ternary5:
      return rows(Ternary5Fragments{});
    case Format::fp8:
      return multiply_mma<Fp8Fragments, E4m3Rows, WideOneTile>(p, stream);
    default:
      MOERT_CHECK(false, "packed weights must have a format that rows of codes are multiplied with, got ",
                  cpu::name(p.w.matrix.packing.format));
  }
}

}  // namespace moert::cuda
