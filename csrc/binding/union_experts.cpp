#include "moert/union_experts.h"

#include "binding/batch_invariant.h"
#include "binding/expert_weights.h"
#include "binding/ids.h"

namespace moert {

Tensor union_experts(const Tensor& x, const Tensor& gains, const Tensor& ids, const Tensor& w1, const Tensor& w2,
                     const std::optional<Tensor>& b1, const std::optional<Tensor>& b2, std::string activation,
                     double alpha, double limit, bool transposed, bool interleaved) {
  CHECK_DIM(x, 2, "[T, H]");
  CHECK_FLOAT(x);
  CHECK_DEVICE(x);
  CHECK_DIM(ids, 1, "[n]");
  CHECK_SAME_DEVICE(ids, x);
  CHECK_SAME_DEVICE(gains, x);
  check_expert_matrices(x, w1, w2);
  const int64_t T = x.size(0), E = w1.size(0);
  MOERT_CHECK(has_shape(gains, {T, E}), "gains must have shape [T=", T, ", E=", E, "], got ", shape(gains));
  CHECK_SCALE_DTYPE(gains, x);
  const Experts experts = experts_of(x, w1, w2, b1, b2, activation, alpha, limit, transposed, interleaved);

  const Tensor rows = dense_rows(x), scales = scale_values(gains, x);
  const Tensor list = expert_ids(torch::stable::view(torch::stable::contiguous(ids), {1, ids.size(0)}), E);
  Tensor y = torch::stable::new_empty(x, {T, x.size(1)});
  const UnionRows tokens{T,
                         ids.size(0),
                         rows_of(rows),
                         scales.const_data_ptr(),
                         static_cast<const int32_t*>(list.const_data_ptr()),
                         batch_invariant};
#if defined(MOERT_CUDA)
  Tensor workspace = bytes_beside(x, cuda::union_experts_workspace(tokens, experts.weights));
  cuda::union_experts(tokens, experts.weights, workspace.mutable_data_ptr(), Execution(x), y.mutable_data_ptr());
#else
  cpu::union_experts(tokens, experts.weights, Execution(x), y.mutable_data_ptr());
#endif
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(moert, MOERT_DISPATCH_KEY, m) { m.impl("union_experts", TORCH_BOX(&union_experts)); }

}  // namespace moert
