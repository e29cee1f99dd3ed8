// The product of one tile of quantized rows with packed weights.  Included by one translation unit per instruction set.
#pragma once

#include "cpu/packed_panels.h"
#include "cpu/packed_requantize.h"

namespace moert::cpu {
namespace {

// From so many rows on a panel pays: it costs what about three rows cost, more where each packed byte becomes four, and
// most where 8 rows of x share what was unpacked (VNNI).
template <typename Code, Scales kScales>
MOERT_INLINE int64_t rows_for_panels(const Packing& p) {
  if constexpr (kTransposed<Code>) return rows_at_a_time<Code>(row_layout<Code>(p.columns)) == 8 ? 25 : 9;
  return Code::kPlanes == 4 && kScales == Scales::none ? 17 : 5;
}

template <typename Code, Scales kScales>
void packed_product(const PackedTile& t) {
#if defined(__AVX2__)
  if (t.M >= rows_for_panels<Code, kScales>(t.b.packing) && !t.batch_invariant) return packed_panels<Code, kScales>(t);
#endif
  packed_dots<Code, kScales>(t);
}

void packed_gemm(const PackedTile& t) {
  if (requantizes(t.b.packing, t.precision))
    return requantized(t, [](const PackedTile& part) { packed_product<Int8Code, Scales::none>(part); });
  with_code(t.b.packing, t.precision, [&](auto code) {
    using Code = decltype(code);
    if constexpr (std::is_same_v<Code, Int8Code>) {
      packed_product<Code, Scales::none>(t);
    } else if constexpr (Code::kPlanes < 4 || Code::kUnpacked) {  // in groups, or one that never ends
      packed_product<Code, Scales::both>(t);
    } else {
      if constexpr (Code::kPlanes == 4)
        if (t.b.packing.group) return packed_product<Code, Scales::both>(t);
      if (is_int8_row(t.precision))
        packed_product<Code, Scales::none>(t);
      else
        packed_product<Code, Scales::activations>(t);
    }
  });
}

}  // namespace
}  // namespace moert::cpu
