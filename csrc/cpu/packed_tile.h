// The product of one tile of quantized rows with packed weights.  Included by one translation unit per instruction set.
#pragma once

#include "cpu/packed_panels.h"
#include "cpu/packed_requantize.h"

namespace moert::cpu {
namespace {

// From so many rows on a panel pays: it costs what about three rows cost, and more where each packed byte becomes four.
template <typename Code, Scales kScales>
constexpr int64_t kPanelRows = Code::kPlanes == 4 && kScales == Scales::none ? 17 : 5;

template <typename Code, Scales kScales>
void packed_product(const PackedTile& t) {
#if defined(__AVX2__)
  if constexpr (!kGroupLanes<Code>)
    if (t.M >= kPanelRows<Code, kScales> && !t.batch_invariant) return packed_panels<Code, kScales>(t);
#endif
  packed_dots<Code, kScales>(t);
}

void packed_gemm(const PackedTile& t) {
  if (requantizes(t.b.packing, t.precision))
    return requantized(t, [](const PackedTile& part) { packed_product<Int8Code, Scales::none>(part); });
  with_code(t.b.packing, t.precision, [&](auto code) {
    using Code = decltype(code);
    if constexpr (Code::kPlanes == 5) {
      packed_product<Code, Scales::none>(t);
    } else if constexpr (Code::kPlanes == 2 || Code::kPlanes == 8) {  // always in groups
      packed_product<Code, Scales::both>(t);
    } else {
      if (t.b.packing.group)
        packed_product<Code, Scales::both>(t);
      else if (is_int8_row(t.precision))
        packed_product<Code, Scales::none>(t);
      else
        packed_product<Code, Scales::activations>(t);
    }
  });
}

}  // namespace
}  // namespace moert::cpu
