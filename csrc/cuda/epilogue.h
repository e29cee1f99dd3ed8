// What becomes of the sums of a grouped product: scale, bias, activation, and where they are stored.
#pragma once

#include "cuda/activation.h"
#include "cuda/numbers.h"

namespace moert::cuda {

// Neighbours of a row, stored at once.
template <typename T, int n>
struct alignas(n * sizeof(T) < 16 ? n * sizeof(T) : 16) Neighbours {
  T values[n];
};

// In words of 16 bytes where they fill some, by the instruction for it: the compiler would store them 4 bytes at a
// time.
template <typename T, int n>
MOERT_HOST_DEVICE inline void put(T* to, const Neighbours<T, n>& from) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(from) % sizeof(uint4) == 0) {
    uint4 words[sizeof(from) / sizeof(uint4)];
    memcpy(words, &from, sizeof(from));
    for (int i = 0; i < int(sizeof(from) / sizeof(uint4)); ++i)
      asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
                   :
                   : "l"(reinterpret_cast<uint4*>(to) + i), "r"(words[i].x), "r"(words[i].y), "r"(words[i].z),
                     "r"(words[i].w)
                   : "memory");
    return;
  }
#endif
  *reinterpret_cast<Neighbours<T, n>*>(to) = from;
}

template <int n, typename T>
MOERT_HOST_DEVICE inline Neighbours<T, n> take(const T* from) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(Neighbours<T, n>) % sizeof(uint4) == 0) {
    uint4 words[sizeof(Neighbours<T, n>) / sizeof(uint4)];
    for (int i = 0; i < int(sizeof(words) / sizeof(uint4)); ++i) words[i] = reinterpret_cast<const uint4*>(from)[i];
    Neighbours<T, n> to;
    memcpy(&to, words, sizeof(to));
    return to;
  }
#endif
  return *reinterpret_cast<const Neighbours<T, n>*>(from);
}

// Each to what is there, one at a time with all others that add to it.  Of four neighbours Hopper's memory takes one
// addition.
template <typename A, int n>
MOERT_HOST_DEVICE inline void add(A* to, const A (&values)[n]) {
#if defined(__CUDA_ARCH__)
#if __CUDA_ARCH__ >= 900
  if constexpr (sizeof(A) == 4 && n % 4 == 0) {
    for (int i = 0; i < n; i += 4)
      asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};"
                   :
                   : "l"(to + i), "f"(values[i]), "f"(values[i + 1]), "f"(values[i + 2]), "f"(values[i + 3])
                   : "memory");
    return;
  }
#endif
  for (int i = 0; i < n; ++i) atomicAdd(to + i, values[i]);
#else
  for (int i = 0; i < n; ++i) to[i] += values[i];
#endif
}

// n gates and n ups from 2 n values in turns.
template <typename A, int n>
MOERT_HOST_DEVICE inline void separate(A (&low)[n], A (&high)[n]) {
  A values[2 * n];
  for (int i = 0; i < n; ++i) values[i] = low[i], values[n + i] = high[i];
  for (int i = 0; i < n; ++i) low[i] = values[2 * i], high[i] = values[2 * i + 1];
}

template <typename T>
struct Epilogue {
  using A = Acc<T>;
  static constexpr bool kSumsRows = false;  // whether store() returns what is summed along rows

  T* y;              // [S, N]
  int64_t y_stride;  // between rows
  int64_t N;
  const T* bias = nullptr;     // [E, N], of the gate where there is one
  const T* up_bias = nullptr;  // [E, N]
  int64_t bias_expert = 0, bias_step = 1;
  const A* scale = nullptr;  // [S]
  bool scale_input = false;
  bool activates = false;
  ActivationForm<A> form{};
  T* h = nullptr;  // [S, N] or, gate then up, [S, 2N], dense: what the activation is given
  // Where there are sums [tokens, N], rows are added to those of their tokens, unrounded and in no order, and y and h
  // are not written.
  A* sums = nullptr;
  const int32_t* tokens = nullptr;  // [S]
  int64_t num_tokens = 0;

  // Whether it acts on two products, gate and up.
  MOERT_HOST_DEVICE bool takes_up() const { return form.gated; }

  // A sum of the product as the activation is given it.
  MOERT_HOST_DEVICE A before(int32_t expert, int64_t row, int64_t column, A sum, const T* b) const {
    if (scale && scale_input) sum *= scale[row];
    return b ? sum + widen(b[expert * bias_expert + column * bias_step]) : sum;
  }

  // As it is stored in y.
  MOERT_HOST_DEVICE A after(int64_t row, A g, A u) const {
    const A value = activates ? activate(form, g, u) : g;
    return scale && !scale_input ? value * scale[row] : value;
  }

  // n columns from `column` on, which y and h must be aligned to; `up` is not looked at where there is no gate.
  template <int n>
  MOERT_HOST_DEVICE void store(int32_t expert, int64_t row, int64_t column, const A (&gate)[n],
                               const A (&up)[n]) const {
    Neighbours<T, n> out, h_gate, h_up;
    A values[n];
    for (int i = 0; i < n; ++i) {
      const A g = before(expert, row, column + i, gate[i], bias);
      const A u = form.gated ? before(expert, row, column + i, up[i], up_bias) : A(0);
      h_gate.values[i] = narrow<T>(g);
      h_up.values[i] = narrow<T>(u);
      values[i] = after(row, g, u);
    }
    if (sums) {
      const int64_t token = tokens[row];
      if (token >= 0 && token < num_tokens) add(sums + token * N + column, values);
      return;
    }
    for (int i = 0; i < n; ++i) out.values[i] = narrow<T>(values[i]);
    put_row(row, column, out, h_gate, h_up);
  }

  // A slot that no expert has.
  MOERT_HOST_DEVICE void clear(int64_t row, int64_t column) const {
    const Neighbours<T, 1> zero{{narrow<T>(0)}};
    if (!sums) put_row(row, column, zero, zero, zero);
  }

  template <int n>
  MOERT_HOST_DEVICE void put_row(int64_t row, int64_t column, const Neighbours<T, n>& out,
                                 const Neighbours<T, n>& h_gate, const Neighbours<T, n>& h_up) const {
    put(y + row * y_stride + column, out);
    if (!h) return;
    T* h_row = h + row * (form.gated ? 2 : 1) * N + column;
    put(h_row, h_gate);
    if (form.gated) put(h_row + N, h_up);
  }
};

}  // namespace moert::cuda
