// Elements to the type of their sums and back.
#pragma once

#include "moert/dtype.h"

namespace moert::cuda {

MOERT_HOST_DEVICE static inline double widen(double x) { return x; }
template <typename T>
MOERT_HOST_DEVICE inline float widen(T x) {
  return to_float(x);
}

template <typename T>
MOERT_HOST_DEVICE inline T narrow(Acc<T> x) {
  if constexpr (std::is_same_v<T, bf16>)
    return to_bf16(x);
  else if constexpr (std::is_same_v<T, f16>)
    return to_f16(x);
  else
    return x;
}

}  // namespace moert::cuda
