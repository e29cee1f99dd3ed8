// The contract checks of every binding.  Each message names the argument, what it must be, and what it got.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <string>

#include "moert/check.h"
#include "moert/dtype.h"

namespace moert {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape(const Tensor& x) {
  std::string out = "[";
  for (int64_t d = 0; d < x.dim(); ++d) out += (d ? ", " : "") + std::to_string(x.size(d));
  return out + "]";
}

inline bool has_shape(const Tensor& x, std::initializer_list<int64_t> sizes) {
  if (x.dim() != int64_t(sizes.size())) return false;
  int64_t d = 0;
  for (int64_t size : sizes)
    if (x.size(d++) != size) return false;
  return true;
}

inline bool is_float(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::BFloat16 || t == ScalarType::Half || t == ScalarType::Double;
}

inline DType dtype(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::Double:
      return DType::f64;
    default:
      return DType::f32;
  }
}

// The type that sums are kept in: float64 for float64, else float32.
inline ScalarType accumulate_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// x itself where the elements of its last dimension lie side by side, else a copy of which that is true.
inline Tensor dense_rows(const Tensor& x) {
  const int64_t d = x.dim() - 1;
  return x.size(d) <= 1 || x.stride(d) == 1 ? x : torch::stable::contiguous(x);
}

}  // namespace moert

#define CHECK_DIM(x, n, layout) MOERT_CHECK((x).dim() == (n), #x " must be " layout ", got shape ", ::moert::shape(x))
#define CHECK_DTYPE(x, type)                                                                                   \
  MOERT_CHECK((x).scalar_type() == torch::headeronly::ScalarType::type, #x " must have dtype " #type ", got ", \
              torch::headeronly::toString((x).scalar_type()))
#define CHECK_FLOAT(x)                                                                                           \
  MOERT_CHECK(::moert::is_float((x).scalar_type()), #x " must have dtype Float, BFloat16, Half or Double, got ", \
              torch::headeronly::toString((x).scalar_type()))
#define CHECK_SAME_DTYPE(x, y)                                                               \
  MOERT_CHECK((x).scalar_type() == (y).scalar_type(), #x " must have the dtype of " #y ", ", \
              torch::headeronly::toString((y).scalar_type()), ", got ",                      \
              torch::headeronly::toString((x).scalar_type()))
