// Tensors of expert weights as the kernels take them.
#pragma once

#include <string>

#include "binding/device.h"
#include "moert/fused_experts.h"

namespace moert {

// x [rows, columns] with the elements of a row side by side.
inline Rows rows_of(const Tensor& x, const int32_t* index = nullptr) {
  return {x.const_data_ptr(), dtype(x), x.stride(0), index, x.size(0)};
}

// w [E, R, C] of any strides, or [E, C, R] if transposed.
inline ExpertMatrix expert_matrix(const Tensor& w, bool transposed) {
  const int64_t row = transposed ? w.stride(2) : w.stride(1), column = transposed ? w.stride(1) : w.stride(2);
  return {w.const_data_ptr(), dtype(w), w.stride(0), row, column};
}

inline ExpertVector expert_vector(const std::optional<Tensor>& v) {
  if (!v) return {};
  return {v->const_data_ptr(), dtype(*v), v->stride(0)};
}

inline ScaleOn scale_on_of(const std::string& scale_on) {
  MOERT_CHECK(scale_on == "output" || scale_on == "input", "scale_on must be output or input, got ", scale_on);
  return scale_on == "input" ? ScaleOn::input : ScaleOn::output;
}

// Scales in the type of sums, dense: widening loses nothing.  Calls into torch only where there is something to do: for
// one token each such call takes longer than the arithmetic.
inline Tensor scale_values(const Tensor& scale, const Tensor& x) {
  const ScalarType type = accumulate_type(x);
  const Tensor sums = scale.scalar_type() == type ? scale : torch::stable::to(scale, type);
  return sums.is_contiguous() ? sums : torch::stable::contiguous(sums);
}

}  // namespace moert

// Routing weights and row scales come in x's dtype or in that of its sums.
#define CHECK_SCALE_DTYPE(scale, x)                                                                               \
  MOERT_CHECK((scale).scalar_type() == (x).scalar_type() || (scale).scalar_type() == ::moert::accumulate_type(x), \
              #scale " must have dtype ", torch::headeronly::toString(::moert::accumulate_type(x)),               \
              " or that of " #x ", got ", torch::headeronly::toString((scale).scalar_type()))

namespace moert {

// Tokens and where they go, of fused_experts in any form.
inline void check_routed(const Tensor& x, const Tensor& ids, const Tensor& weights) {
  CHECK_DIM(x, 2, "[T, H]");
  CHECK_FLOAT(x);
  CHECK_DEVICE(x);
  CHECK_DIM(ids, 2, "[T, k]");
  CHECK_SAME_DEVICE(ids, x);
  CHECK_DIM(weights, 2, "[T, k]");
  CHECK_SAME_DEVICE(weights, x);
  MOERT_CHECK(ids.size(0) == x.size(0), "ids must have shape [T=", x.size(0), ", k], got ", shape(ids));
  MOERT_CHECK(has_shape(weights, {ids.size(0), ids.size(1)}), "weights must have the shape of ids, ", shape(ids),
              ", got ", shape(weights));
  CHECK_SCALE_DTYPE(weights, x);
}

}  // namespace moert
