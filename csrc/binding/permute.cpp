#include "moert/permute.h"

#include <tuple>

#include "binding/experts.h"
#include "binding/ids.h"
#include "binding/plan.h"

namespace moert {

namespace {

// What the operators after permute_plan are given of a plan.
struct Plan {
  int64_t T, k, S;
  Tensor tokens, slots;
};

Plan check_plan(const Tensor& tokens, const Tensor& slots) {
  CHECK_DEVICE(tokens);
  CHECK_SAME_DEVICE(slots, tokens);
  CHECK_DIM(slots, 2, "[T, k]");
  CHECK_DTYPE(slots, Int);
  CHECK_DTYPE(tokens, Int);
  CHECK_DIM(tokens, 1, "[S]");
  const int64_t T = slots.size(0), k = slots.size(1), S = tokens.numel(), most = std::numeric_limits<int32_t>::max();
  MOERT_CHECK(slots.numel() <= most && T <= most, "slots must have fewer than 2^31 elements, got shape ", shape(slots));
  MOERT_CHECK(S <= most, "tokens must have fewer than 2^31 elements, got shape ", shape(tokens));
  return {T, k, S, torch::stable::contiguous(tokens), torch::stable::contiguous(slots)};
}

void check_rows(const Tensor& rows, const Plan& plan) {
  CHECK_SAME_DEVICE(rows, plan.tokens);
  CHECK_FLOAT(rows);
  CHECK_DIM(rows, 2, "[S, H]");
  MOERT_CHECK(rows.size(0) == plan.S, "rows must have shape [S=", plan.S, ", H], got ", shape(rows));
}

// weights [T, k] in the type that sums are kept in.
Tensor check_weights(const Tensor& weights, const Tensor& rows, const Plan& plan) {
  CHECK_SAME_DEVICE(weights, rows);
  CHECK_SCALE_DTYPE(weights, rows);
  MOERT_CHECK(has_shape(weights, {plan.T, plan.k}), "weights must have shape [T=", plan.T, ", k=", plan.k, "], got ",
              shape(weights));
  return scale_values(weights, rows);
}

// residual [T, H] with the elements of a row side by side.
Tensor check_residual(const Tensor& residual, const Tensor& rows, const Plan& plan) {
  CHECK_SAME_DEVICE(residual, rows);
  CHECK_SAME_DTYPE(residual, rows);
  MOERT_CHECK(has_shape(residual, {plan.T, rows.size(1)}), "residual must have shape [T=", plan.T, ", H=", rows.size(1),
              "], got ", shape(residual));
  return dense_rows(residual);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> permute_plan(const Tensor& ids, int64_t num_experts,
                                                std::optional<int64_t> capacity) {
  const int64_t most = std::numeric_limits<int32_t>::max() / std::max<int64_t>(1, num_experts);
  MOERT_CHECK(!capacity || (*capacity >= 0 && *capacity <= most), "capacity must be in [0, 2^31 / num_experts), got ",
              *capacity);
  const Tensor ready = expert_ids(ids, num_experts);
  const int64_t T = ids.size(0), k = ids.size(1);
  Tensor offsets = torch::stable::new_empty(ids, {num_experts + 1}, ScalarType::Int);
  Tensor tokens = torch::stable::new_empty(ids, {capacity ? num_experts * *capacity : T * k}, ScalarType::Int);
  Tensor slots = torch::stable::new_empty(ids, {T, k}, ScalarType::Int);
  sort_choices(ready, num_experts, capacity.value_or(-1), offsets, tokens, slots);
  return {offsets, tokens, slots};
}

Tensor permute(const Tensor& x, const Tensor& tokens, const Tensor& slots) {
  const Plan plan = check_plan(tokens, slots);
  CHECK_SAME_DEVICE(x, plan.tokens);
  CHECK_FLOAT(x);
  CHECK_DIM(x, 2, "[T, H]");
  MOERT_CHECK(x.size(0) == plan.T, "x must have shape [T=", plan.T, ", H], got ", shape(x));
  const int64_t H = x.size(1);
  const Tensor from = dense_rows(x);
  Tensor rows = torch::stable::new_empty(x, {plan.S, H});
  device::permute_rows(from.const_data_ptr(), from.stride(0), dtype(x), plan.tokens.const_data_ptr<int32_t>(), plan.T,
                       plan.S, H, Execution(x), rows.mutable_data_ptr());
  return rows;
}

Tensor unpermute(const Tensor& rows, const Tensor& tokens, const Tensor& slots, const std::optional<Tensor>& weights,
                 const std::optional<Tensor>& residual) {
  const Plan plan = check_plan(tokens, slots);
  check_rows(rows, plan);
  const std::optional<Tensor> w = weights ? std::optional(check_weights(*weights, rows, plan)) : std::nullopt;
  const int64_t H = rows.size(1);
  const std::optional<Tensor> start = residual ? std::optional(check_residual(*residual, rows, plan)) : std::nullopt;
  const Tensor from = dense_rows(rows);
  Tensor y = torch::stable::new_empty(rows, {plan.T, H});
  device::unpermute_rows(from.const_data_ptr(), from.stride(0), dtype(rows), plan.slots.const_data_ptr<int32_t>(),
                         w ? w->const_data_ptr() : nullptr, start ? start->const_data_ptr() : nullptr,
                         start ? start->stride(0) : 0, plan.T, plan.k, plan.S, H, Execution(rows),
                         y.mutable_data_ptr());
  return y;
}

std::tuple<Tensor, Tensor> unpermute_backward(const Tensor& dy, const Tensor& rows, const Tensor& tokens,
                                              const Tensor& slots, const Tensor& weights) {
  const Plan plan = check_plan(tokens, slots);
  check_rows(rows, plan);
  const Tensor w = check_weights(weights, rows, plan);
  const int64_t H = rows.size(1);
  CHECK_SAME_DEVICE(dy, rows);
  CHECK_SAME_DTYPE(dy, rows);
  MOERT_CHECK(has_shape(dy, {plan.T, H}), "dy must have shape [T=", plan.T, ", H=", H, "], got ", shape(dy));
  const Tensor from = dense_rows(rows), dfrom = dense_rows(dy);
  Tensor drows = torch::stable::new_empty(rows, {plan.S, H});
  Tensor dweights = torch::stable::new_empty(w, {plan.T, plan.k});
  device::unpermute_rows_backward(dfrom.const_data_ptr(), dfrom.stride(0), from.const_data_ptr(), from.stride(0),
                                  dtype(rows), plan.tokens.const_data_ptr<int32_t>(),
                                  plan.slots.const_data_ptr<int32_t>(), w.const_data_ptr(), plan.T, plan.k, plan.S, H,
                                  Execution(rows), drows.mutable_data_ptr(), dweights.mutable_data_ptr());
  return {drows, torch::stable::to(dweights, weights.scalar_type())};
}

STABLE_TORCH_LIBRARY_IMPL(moert, MOERT_DISPATCH_KEY, m) {
  m.impl("permute_plan", TORCH_BOX(&permute_plan));
  m.impl("permute", TORCH_BOX(&permute));
  m.impl("unpermute", TORCH_BOX(&unpermute));
  m.impl("unpermute_backward", TORCH_BOX(&unpermute_backward));
}

}  // namespace moert
