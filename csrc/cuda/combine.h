// Rows of each token's slots, added up.
#pragma once

#include "moert/fused_experts.h"

namespace moert::cuda {

// Rows [S, H] of slots.  `own` has those of slots first .. first + O, `rows` the others, one after the other.
struct SlotRows {
  const void* rows;
  int64_t stride;
  DType dtype;
  int64_t S, H;
  const void* own = nullptr;
  int64_t own_stride = 0, first = 0, O = 0;
};

// y [T, H] = onto + the sum over j, in order, of weights[t, j] (null: one) * the row of slots[t, j]; a slot outside
// [0, S) is left out.
void combine_rows(const SlotRows& rows, const int32_t* slots, const void* weights, const Onto& onto, int64_t T,
                  int64_t k, void* stream, void* y);

}  // namespace moert::cuda
