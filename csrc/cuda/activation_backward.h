// What becomes of the sums g = dy . down of a slot: the gradient of its pre-activations, and with it all that the
// products after this one need.  An epilogue like that of epilogue.h.
#pragma once

#include "cuda/epilogue.h"

namespace moert::cuda {

// Columns of <g, act> that are added up at once.  Every kernel's tiles are a multiple of it, so that the sums do not
// depend on which kernel it is.
constexpr int kDotColumns = 64;

// With d = g, or weight g where the weight scales the output:
template <typename T>
struct ActivationBackward {
  using A = Acc<T>;
  static constexpr bool kSumsRows = true;

  int64_t N;       // I
  const T* h;      // [S, I] or [S, 2I], gate then up
  const A* scale;  // [S] or null
  ActivationForm<A> form;
  bool alternate;  // dh holds gate and up in turns, else one after the other
  T* dh;           // [S, I] or [S, 2I]: the gradient of h, in the order of w1's rows
  T* act;          // [S, I] or null: weight act
  A* dots;         // [S, parts()] or null: <g, act>

  static constexpr bool takes_up() { return false; }
  MOERT_HOST_DEVICE int64_t parts() const { return (N + kDotColumns - 1) / kDotColumns; }

  // n columns from `column` on, which h, dh and act must be aligned to; returns their part of <g, act>.
  template <int n>
  MOERT_HOST_DEVICE A store(int32_t, int64_t row, int64_t column, const A (&g)[n], const A (&)[n]) const {
    const A factor = scale ? scale[row] : A(1);
    const T* from = h + row * (form.gated ? 2 : 1) * N + column;
    const Neighbours<T, n> gate = take<n>(from), up = form.gated ? take<n>(from + N) : gate;
    Neighbours<T, n> dgate, dup, scaled;
    A dot = 0;
    for (int i = 0; i < n; ++i) {
      const auto d = activate_backward(form, A(widen(gate.values[i])), A(widen(up.values[i])), factor * g[i]);
      dgate.values[i] = narrow<T>(d.dgate);
      dup.values[i] = narrow<T>(d.dup);
      scaled.values[i] = narrow<T>(factor * d.act);
      dot += g[i] * d.act;
    }
    put_row(row, column, dgate, dup);
    if (act) put(act + row * N + column, scaled);
    return dot;
  }

  template <int n>
  MOERT_HOST_DEVICE void put_row(int64_t row, int64_t column, const Neighbours<T, n>& dgate,
                                 const Neighbours<T, n>& dup) const {
    T* to = dh + row * (form.gated ? 2 : 1) * N;
    if (!form.gated) {
      put(to + column, dgate);
    } else if (!alternate) {
      put(to + column, dgate);
      put(to + N + column, dup);
    } else {
      Neighbours<T, 2 * n> turns;
      for (int i = 0; i < n; ++i) turns.values[2 * i] = dgate.values[i], turns.values[2 * i + 1] = dup.values[i];
      put(to + 2 * column, turns);
    }
  }

  // The sum of kDotColumns columns' parts.
  MOERT_HOST_DEVICE void put_sum(int64_t row, int64_t column, A sum) const {
    if (dots) dots[row * parts() + column / kDotColumns] = sum;
  }

  // A slot that no expert has: nobody reads it.
  MOERT_HOST_DEVICE void clear(int64_t, int64_t) const {}
};

}  // namespace moert::cuda
