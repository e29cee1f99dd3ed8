// Which products the tensor cores take, and the kernels that do them.
#pragma once

#include "cuda/activation_backward.h"
#include "cuda/grouped_gemm_product.h"

namespace moert::cuda {

// Rows of which 16-byte pieces can be copied: their start, the distance between them and their length.
template <typename T>
bool in_pieces(const void* data, int64_t stride, int64_t length) {
  constexpr int64_t kPiece = 16 / sizeof(T);
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % kPiece == 0 && length % kPiece == 0;
}

// Each matrix of w in 16-byte pieces along its rows or along its columns.
template <typename T>
bool weights_in_pieces(const MatrixOf<const T>& w, int64_t rows, int64_t columns) {
  if (w.expert * int64_t(sizeof(T)) % 16) return false;
  if (w.column == 1) return in_pieces<T>(w.data, w.row, columns);
  return w.row == 1 && in_pieces<T>(w.data, w.column, rows);
}

template <typename T>
bool stores_pieces(const Epilogue<T>& to, int64_t N) {
  return in_pieces<T>(to.y, to.y_stride, N) && (!to.h || in_pieces<T>(to.h, N, N));
}

template <typename T>
bool stores_pieces(const ActivationBackward<T>& to, int64_t N) {
  return in_pieces<T>(to.h, N, N) && in_pieces<T>(to.dh, N, N) && (!to.act || in_pieces<T>(to.act, N, N));
}

// Of the outputs eight columns are stored at once.
template <typename T, class To>
bool fits_tensor_cores(const Product<T, To>& p) {
  constexpr int64_t kPiece = 16 / sizeof(T);
  if (p.N % 8 || !in_pieces<T>(p.x.data, p.x.stride, p.K) || !stores_pieces(p.epilogue, p.N)) return false;
  if (p.K > 0x7fffffff) return false;
  if (!p.epilogue.takes_up()) return weights_in_pieces(p.w, p.N, p.K);
  // An MN-major w1 of alternating columns: the pieces hold gates and ups in turns.
  if (p.w.row == 2 && p.w.column != 1)
    return p.up.data == p.w.data + 1 && p.w.expert % kPiece == 0 && in_pieces<T>(p.w.data, p.w.column, 2 * p.N);
  return p.up.row == p.w.row && p.up.column == p.w.column && weights_in_pieces(p.w, p.N, p.K) &&
         weights_in_pieces(p.up, p.N, p.K);
}

template <typename T>
bool fits_tensor_cores(const Gradient<T>& p) {
  const auto stores = [&](const auto* data) {
    using W = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
    return in_pieces<W>(data, p.dw.row, p.K) && p.dw.expert * int64_t(sizeof(W)) % 16 == 0;
  };
  return p.K % 8 == 0 && in_pieces<T>(p.dy.data, p.dy.stride, p.N) && in_pieces<T>(p.x.data, p.x.stride, p.K) &&
         p.dw.column == 1 && (p.onto ? stores(p.onto) : stores(p.dw.data));
}

// T is bf16, f16 or float; a float is rounded to tf32.
template <typename T, class To>
void grouped_gemm_on_tensor_cores(const Product<T, To>& p, void* stream);
template <typename T>
void wgrad_on_tensor_cores(const Gradient<T>& p, void* stream);

}  // namespace moert::cuda
