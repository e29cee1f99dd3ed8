// The row kernels of permute, for the instruction set that the including file is compiled for.
#pragma once

#include "cpu/permute_isa.h"
#include "cpu/simd.h"

namespace moert::cpu {
namespace {

void stream_row(const void* from, void* to, int64_t bytes) {
  const char* in = static_cast<const char*>(from);
  char* out = static_cast<char*>(to);
  const int64_t to_aligned = -uintptr_t(to) % kVectorBytes, head = to_aligned < bytes ? to_aligned : bytes;
  std::memcpy(out, in, head);
  int64_t i = head;
  for (; i + kVectorBytes <= bytes; i += kVectorBytes) {
    Vec<float> x;
    std::memcpy(&x, in + i, sizeof x);
    stream(reinterpret_cast<float*>(out + i), x);
  }
  std::memcpy(out + i, in + i, bytes - i);
}

// On their way from memory to the second-level cache: the CPU does not foresee rows that lie anywhere.
MOERT_INLINE void fetch(const void* data, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(data) + i, 0, 2);
}

template <typename T>
MOERT_INLINE const T* row_at(const RowPlaces& p, int32_t slot) {
  if (slot < p.first) return static_cast<const T*>(p.rows) + slot * p.rows_stride;
  if (slot < p.last) return static_cast<const T*>(p.own) + (slot - p.first) * p.own_stride;
  return static_cast<const T*>(p.rows) + (slot - (p.last - p.first)) * p.rows_stride;
}

// The sums of `Vectors` vectors of columns stay in registers while the choices pass by.
template <typename T, int Vectors>
void sum_columns(const SumOfRows& s, int64_t h) {
  using A = Acc<T>;
  Vec<A> sum[Vectors] = {};
  for (int v = 0; s.start && v < Vectors; ++v) sum[v] = load(static_cast<const T*>(s.start) + h + v * kLanes<A>);
  for (int64_t j = 0; j < s.k; ++j) {
    if (s.slots[j] < 0) continue;
    const T* row = row_at<T>(s.places, s.slots[j]) + h;
    const A weight = s.weights ? static_cast<const A*>(s.weights)[j] : A(1);
    for (int v = 0; v < Vectors; ++v) sum[v] += load(row + v * kLanes<A>) * weight;
  }
  for (int64_t j = 0; s.next_slots && j < s.k; ++j)
    if (s.next_slots[j] >= 0) fetch(row_at<T>(s.places, s.next_slots[j]) + h, Vectors * kLanes<A> * sizeof(T));
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
    const T* row = row_at<T>(s.places, s.slots[j]) + h;
    const A weight = s.weights ? static_cast<const A*>(s.weights)[j] : A(1);
    sum += load_first(row, s.H - h) * weight;
  }
  store_first(static_cast<T*>(s.y) + h, sum, s.H - h);
}

template <typename T>
double row_gradient_of(const RowGradient& g) {
  using A = Acc<T>;
  const A weight = A(g.weight);
  const T *dy = static_cast<const T*>(g.dy), *row = static_cast<const T*>(g.row);
  T* drow = static_cast<T*>(g.drow);
  const bool past_caches = g.stream && uintptr_t(drow) % (kLanes<A> * sizeof(T)) == 0;
  Vec<A> sum{};
  for_vectors<A>(g.H, [&](int64_t h, auto count) {
    const Vec<A> d = load(dy + h, count);
    sum += d * load(row + h, count);
    if (past_caches && count == kLanes<A>) return stream(drow + h, d * weight);
    store(drow + h, d * weight, count);
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
