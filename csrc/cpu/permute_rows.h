// The row kernels of permute, for the instruction set that the including file is compiled for.
#pragma once

#include <type_traits>

#include "cpu/permute_isa.h"

namespace moert::cpu {
namespace {

template <typename T>
using Value = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline double widen(double x) { return x; }
inline float widen(float x) { return x; }
inline float widen(bf16 x) { return to_float(x); }
inline float widen(f16 x) { return to_float(x); }
inline void narrow(double x, double& y) { y = x; }
inline void narrow(float x, float& y) { y = x; }
inline void narrow(float x, bf16& y) { y = to_bf16(x); }
inline void narrow(float x, f16& y) { y = to_f16(x); }

constexpr int64_t kColumns = 64;  // whose sums stay in registers

template <typename T>
void sum_rows_of(const SumOfRows& s) {
  using V = Value<T>;
  for (int64_t h = 0; h < s.H; h += kColumns) {
    V sum[kColumns] = {};
    const int64_t n = s.H - h < kColumns ? s.H - h : kColumns;
    for (int64_t j = 0; j < s.k; ++j) {
      if (s.slots[j] < 0) continue;
      const T* row = static_cast<const T*>(s.rows) + s.slots[j] * s.rows_stride + h;
      const V weight = s.weights ? static_cast<const V*>(s.weights)[j] : V(1);
      for (int64_t i = 0; i < n; ++i) sum[i] += weight * widen(row[i]);
    }
    for (int64_t i = 0; i < n; ++i) narrow(sum[i], static_cast<T*>(s.y)[h + i]);
  }
}

template <typename T>
double row_gradient_of(const RowGradient& g) {
  using V = Value<T>;
  const V weight = V(g.weight);
  V sum[kColumns] = {};
  for (int64_t h = 0; h < g.H; ++h) {
    const V dy = widen(static_cast<const T*>(g.dy)[h]);
    sum[h % kColumns] += dy * widen(static_cast<const T*>(g.row)[h]);
    narrow(weight * dy, static_cast<T*>(g.drow)[h]);
  }
  for (int64_t width = kColumns / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; ++i) sum[i] += sum[i + width];
  return sum[0];
}

void sum_rows(const SumOfRows& s) {
  switch (s.dtype) {
    case DType::f32:
      return sum_rows_of<float>(s);
    case DType::bf16:
      return sum_rows_of<bf16>(s);
    case DType::f16:
      return sum_rows_of<f16>(s);
    case DType::f64:
      return sum_rows_of<double>(s);
  }
}

double row_gradient(const RowGradient& g) {
  switch (g.dtype) {
    case DType::f32:
      return row_gradient_of<float>(g);
    case DType::bf16:
      return row_gradient_of<bf16>(g);
    case DType::f16:
      return row_gradient_of<f16>(g);
    case DType::f64:
      return row_gradient_of<double>(g);
  }
  return 0;
}

}  // namespace
}  // namespace moert::cpu
