// Matrices of small integers: every product and sum is exact in float32 and is rounded once, so that a grouped product
// has one right value, to the bit.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/numbers.h"
#include "moert/grouped_gemm.h"

namespace moert {

inline std::vector<float> integers(int64_t n, uint32_t seed) {
  std::vector<float> x(n);
  for (auto& value : x) value = float(int32_t((seed = seed * 1664525u + 1013904223u) >> 24) % 7 - 3);
  return x;
}

template <typename T>
std::vector<T> rounded(const std::vector<float>& x) {
  std::vector<T> out;
  for (const float value : x) out.push_back(cuda::narrow<T>(value));
  return out;
}

template <typename T>
bool equal(const std::vector<T>& a, const std::vector<T>& b) {
  bool same = a.size() == b.size();
  for (size_t i = 0; i < a.size() && same; ++i) same = cuda::widen(a[i]) == cuda::widen(b[i]);
  return same;
}

// Matrices [E, rows, columns], or turned.
template <typename T>
ExpertMatrix matrix(T* data, int64_t rows, int64_t columns, bool transposed) {
  return {data, DTypeOf<T>::value, rows * columns, transposed ? 1 : columns, transposed ? rows : 1};
}

}  // namespace moert
