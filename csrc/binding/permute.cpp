#include "moert/permute.h"

#include <tuple>

#include "binding/ids.h"

namespace moert {

std::tuple<Tensor, Tensor, Tensor> permute_plan_cpu(const Tensor& ids, int64_t num_experts) {
  const Tensor ready = expert_ids(ids, num_experts);
  const int64_t T = ids.size(0), k = ids.size(1);
  Tensor offsets = torch::stable::new_empty(ids, {num_experts + 1}, ScalarType::Int);
  Tensor tokens = torch::stable::new_empty(ids, {T * k}, ScalarType::Int);
  Tensor slots = torch::stable::new_empty(ids, {T, k}, ScalarType::Int);
  cpu::permute_plan(ready.const_data_ptr<int32_t>(), T, k, num_experts, torch::stable::get_num_threads(),
                    offsets.mutable_data_ptr<int32_t>(), tokens.mutable_data_ptr<int32_t>(),
                    slots.mutable_data_ptr<int32_t>());
  return {offsets, tokens, slots};
}

STABLE_TORCH_LIBRARY_IMPL(moert, CPU, m) { m.impl("permute_plan", TORCH_BOX(&permute_plan_cpu)); }

}  // namespace moert
