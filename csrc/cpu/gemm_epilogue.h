// What happens to a tile after its product.  Included by one translation unit per instruction set.
#pragma once

#include "cpu/activation.h"
#include "cpu/gemm_isa.h"
#include "cpu/simd.h"

namespace moert::cpu {
namespace {

MOERT_INLINE void narrow(float x, float& y) { y = x; }
MOERT_INLINE void narrow(float x, bf16& y) { y = to_bf16(x); }
MOERT_INLINE void narrow(float x, f16& y) { y = to_f16(x); }
MOERT_INLINE void narrow(double x, double& y) { y = x; }
MOERT_INLINE double to_float(double x) { return x; }
using moert::to_float;

template <typename T>
void store_rows(const StoreTile& t) {
  using A = Acc<T>;
  const A *bias = static_cast<const A*>(t.bias), *scale = static_cast<const A*>(t.scale);
  const bool before = t.scale_on == ScaleOn::input;
  const uintptr_t end = uintptr_t(t.out) | uintptr_t(t.row_stride * int64_t(sizeof(T)));
  const bool past_caches = t.stream && t.col_stride == 1 && end % (kLanes<A> * sizeof(T)) == 0;
  for (int64_t m = 0; m < t.M; ++m) {
    const A* c = static_cast<const A*>(t.c) + m * kTileColumns;
    T* out = static_cast<T*>(t.out) + m * t.row_stride;
    const A first = scale && before ? scale[m] : A(1), last = scale && !before ? scale[m] : A(1);
    for_vectors<A>(t.N, [&](int64_t n, auto count) {
      Vec<A> x = load(c + n, count) * first;
      if (bias) x += load(bias + n, count);
      x *= last;
      if (t.accumulate && t.col_stride == 1) x += load(out + n, count);
      if (past_caches && count == kLanes<A>) return stream(out + n, x);
      if (t.col_stride == 1) return store(out + n, x, count);
      for (int64_t i = 0; i < count; ++i) {
        T& to = out[(n + i) * t.col_stride];
        narrow(t.accumulate ? x[i] + A(to_float(to)) : A(x[i]), to);
      }
    });
  }
}

void store_tile(const StoreTile& t) {
  with_dtype(t.dtype, [&](auto x) { store_rows<decltype(x)>(t); });
}

template <typename T>
void widen_rows(const TileMatrix& in, int64_t M, int64_t N, Acc<T>* out, int64_t out_stride) {
  for (int64_t m = 0; m < M; ++m) {
    const T* row = static_cast<const T*>(in.data) + (in.index ? in.index[m] : m) * in.row_stride;
    Acc<T>* y = out + m * out_stride;
    if (in.col_stride == 1)
      for_vectors<Acc<T>>(N, [&](int64_t n, auto count) { store(y + n, load(row + n, count), count); });
    else
      for (int64_t n = 0; n < N; ++n) y[n] = to_float(row[n * in.col_stride]);
  }
}

void widen(const TileMatrix& in, int64_t M, int64_t N, void* out, int64_t out_stride) {
  with_dtype(in.dtype, [&](auto x) {
    using T = decltype(x);
    widen_rows<T>(in, M, N, static_cast<Acc<T>*>(out), out_stride);
  });
}

// f(T{}) for the types that the GEMMs pass on.
template <typename F>
MOERT_INLINE void with_between(DType dtype, const F& f) {
  if (dtype == DType::f64) return f(double{});
  if (dtype == DType::bf16) return f(bf16{});
  f(float{});
}

template <typename T, Act act>
void activate_rows(const ActivateTile& t) {
  using A = Acc<T>;
  const A alpha = A(t.activation.alpha), limit = A(t.activation.limit);
  for (int64_t m = 0; m < t.M; ++m) {
    const A *gate = static_cast<const A*>(t.gate) + m * kTileColumns,
            *up = is_gated(act) ? static_cast<const A*>(t.up) + m * kTileColumns : gate;
    T* out = static_cast<T*>(t.out) + m * t.out_stride;
    for_vectors<A>(t.N, [&](int64_t n, auto count) {
      store(out + n, activate<act>(load(gate + n, count), load(up + n, count), alpha, limit), count);
    });
  }
}

void activate_tile(const ActivateTile& t) {
  with_act(t.activation.act,
           [&](auto act) { with_between(t.dtype, [&](auto x) { activate_rows<decltype(x), act>(t); }); });
}

template <typename T, Act act>
void activate_backward_rows(const ActivateBackwardTile& t) {
  using A = Acc<T>;
  const A alpha = A(t.activation.alpha), limit = A(t.activation.limit);
  for (int64_t m = 0; m < t.M; ++m) {
    const A *gate = static_cast<const A*>(t.gate) + m * kTileColumns,
            *up = is_gated(act) ? static_cast<const A*>(t.up) + m * kTileColumns : gate,
            *g = static_cast<const A*>(t.g) + m * kTileColumns;
    const A scale = t.scale ? static_cast<const A*>(t.scale)[m] : A(1);
    T *dgate = static_cast<T*>(t.dgate) + m * t.dh_stride, *dup = static_cast<T*>(t.dup) + m * t.dh_stride;
    T* out = t.act ? static_cast<T*>(t.act) + m * t.act_stride : nullptr;
    Vec<A> sum{};
    for_vectors<A>(t.N, [&](int64_t n, auto count) {
      const Vec<A> x = load(g + n, count);
      const auto d = activate_backward<act>(load(gate + n, count), load(up + n, count), x * scale, alpha, limit);
      store(dgate + n, d.dgate, count);
      if (is_gated(act)) store(dup + n, d.dup, count);
      if (out) store(out + n, d.act * scale, count);
      sum += x * d.act;
    });
    static_cast<A*>(t.sums)[m] = sum_lanes(sum);
  }
}

void activate_backward_tile(const ActivateBackwardTile& t) {
  with_act(t.activation.act, [&](auto act) {
    with_between(t.dtype, [&](auto x) {
      using T = decltype(x);
      // between_gemms() is bfloat16 only where kernels of AVX-512 serve products of pairs; activate_tile writes it for
      // packed weights too.
      if constexpr (!std::is_same_v<T, bf16> || kVectorBytes == 64)
        activate_backward_rows<T, act>(t);
      else
        __builtin_trap();
    });
  });
}

template <typename T>
void combine_rows(const CombineRow& c) {
  using A = Acc<T>;
  for_vectors<A>(c.N, [&](int64_t h, auto count) {
    Vec<A> y{};
    for (int64_t j = 0; j < c.k; ++j) {
      if (c.slots[j] < 0) continue;
      const Vec<A> x = load(static_cast<const A*>(c.rows) + c.slots[j] * c.row_stride + h, count);
      y += c.weights ? x * static_cast<const A*>(c.weights)[j] : x;
    }
    if (c.onto) {
      const Vec<A> x = load(static_cast<const T*>(c.onto) + h, count);
      y += c.onto_scale ? x * *static_cast<const A*>(c.onto_scale) : x;
    }
    for (int64_t i = 0; i < c.C; ++i) {
      const T* constant = static_cast<const T*>(c.constants) + i * c.constants_stride + h;
      y += load(constant, count) * static_cast<const A*>(c.mix)[i];
    }
    store(static_cast<T*>(c.out) + h, y, count);
  });
}

void combine_row(const CombineRow& c) {
  with_dtype(c.dtype, [&](auto x) { combine_rows<decltype(x)>(c); });
}

template <typename A>
A dot_rows(const A* a, const A* b, int64_t N) {
  Vec<A> sum{};
  for_vectors<A>(N, [&](int64_t n, auto count) { sum += load(a + n, count) * load(b + n, count); });
  return sum_lanes(sum);
}

void dot(const void* a, const void* b, int64_t N, bool is_double, void* out) {
  if (is_double)
    *static_cast<double*>(out) = dot_rows(static_cast<const double*>(a), static_cast<const double*>(b), N);
  else
    *static_cast<float*>(out) = dot_rows(static_cast<const float*>(a), static_cast<const float*>(b), N);
}

}  // namespace
}  // namespace moert::cpu
