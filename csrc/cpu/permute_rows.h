// The row kernels of permute, for the instruction set that the including file is compiled for.
#pragma once

#include "cpu/permute_isa.h"
#include "cpu/simd.h"

namespace moert::cpu {
namespace {

// The sums of `Vectors` vectors of columns stay in registers while the choices pass by.
template <typename T, int Vectors>
void sum_columns(const SumOfRows& s, int64_t h) {
  using A = Acc<T>;
  Vec<A> sum[Vectors] = {};
  for (int v = 0; s.start && v < Vectors; ++v) sum[v] = load(static_cast<const T*>(s.start) + h + v * kLanes<A>);
  for (int64_t j = 0; j < s.k; ++j) {
    if (s.slots[j] < 0) continue;
    const T* row = static_cast<const T*>(s.rows) + s.slots[j] * s.rows_stride + h;
    const A weight = s.weights ? static_cast<const A*>(s.weights)[j] : A(1);
    for (int v = 0; v < Vectors; ++v) sum[v] += load(row + v * kLanes<A>) * weight;
  }
  for (int v = 0; v < Vectors; ++v) store(static_cast<T*>(s.y) + h + v * kLanes<A>, sum[v]);
}

template <typename T>
void sum_rows_of(const SumOfRows& s) {
  using A = Acc<T>;
  constexpr int kVectors = 8;
  int64_t h = 0;
  for (; h + kVectors * kLanes<A> <= s.H; h += kVectors * kLanes<A>) sum_columns<T, kVectors>(s, h);
  for (; h + kLanes<A> <= s.H; h += kLanes<A>) sum_columns<T, 1>(s, h);
  if (h == s.H) return;
  Vec<A> sum = s.start ? load_first(static_cast<const T*>(s.start) + h, s.H - h) : Vec<A>{};
  for (int64_t j = 0; j < s.k; ++j) {
    if (s.slots[j] < 0) continue;
    const T* row = static_cast<const T*>(s.rows) + s.slots[j] * s.rows_stride + h;
    const A weight = s.weights ? static_cast<const A*>(s.weights)[j] : A(1);
    sum += load_first(row, s.H - h) * weight;
  }
  store_first(static_cast<T*>(s.y) + h, sum, s.H - h);
}

template <typename T>
double row_gradient_of(const RowGradient& g) {
  using A = Acc<T>;
  const A weight = A(g.weight);
  Vec<A> sum{};
  for_vectors<A>(g.H, [&](int64_t h, auto count) {
    const Vec<A> dy = load(static_cast<const T*>(g.dy) + h, count);
    sum += dy * load(static_cast<const T*>(g.row) + h, count);
    store(static_cast<T*>(g.drow) + h, dy * weight, count);
  });
  return sum_lanes(sum);
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
