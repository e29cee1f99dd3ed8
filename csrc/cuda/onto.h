// What is added to the sum over a token's choices, as kernels take it.
#pragma once

#include "cuda/numbers.h"
#include "moert/fused_experts.h"

namespace moert::cuda {

template <typename T>
struct OntoOf {
  using A = Acc<T>;

  const T* rows = nullptr;  // [T, H] or null
  int64_t stride = 0;
  const A* scale = nullptr;  // [T] or null
  int64_t C = 0;
  const A* mix = nullptr;        // [T, C]
  const T* constants = nullptr;  // [C, H]

  OntoOf() = default;
  explicit OntoOf(const Onto& onto)
      : rows(static_cast<const T*>(onto.rows.data)),
        stride(onto.rows.stride),
        scale(static_cast<const A*>(onto.scale)),
        C(onto.C),
        mix(static_cast<const A*>(onto.mix)),
        constants(static_cast<const T*>(onto.constants)) {}

  // add(factor, row of H elements) for each of token t's.
  template <typename F>
  MOERT_HOST_DEVICE void for_rows(int64_t t, int64_t H, const F& add) const {
    if (rows) add(scale ? scale[t] : A(1), rows + t * stride);
    for (int64_t c = 0; c < C; ++c) add(mix[t * C + c], constants + c * H);
  }

  // Of column h.
  MOERT_HOST_DEVICE A at(int64_t t, int64_t h, int64_t H) const {
    A sum = 0;
    for_rows(t, H, [&](A factor, const T* row) { sum += factor * A(widen(row[h])); });
    return sum;
  }
};

}  // namespace moert::cuda
