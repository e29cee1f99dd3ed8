// The routing in expert order, where an operator makes it.
#pragma once

#include "binding/device.h"
#include "moert/permute.h"

namespace moert {

// What permute_plan writes, of a GPU with the memory that it works in.
inline void sort_choices(const Tensor& ids, int64_t num_experts, int64_t capacity, Tensor& offsets, Tensor& tokens,
                         Tensor& slots) {
  const int64_t T = ids.size(0), k = ids.size(1);
#if defined(MOERT_CUDA)
  Tensor workspace = bytes_beside(ids, cuda::permute_plan_workspace(T, k, num_experts));
  cuda::permute_plan(ids.const_data_ptr<int32_t>(), T, k, num_experts, capacity, workspace.mutable_data_ptr(),
                     Execution(ids), offsets.mutable_data_ptr<int32_t>(), tokens.mutable_data_ptr<int32_t>(),
                     slots.mutable_data_ptr<int32_t>());
#else
  cpu::permute_plan(ids.const_data_ptr<int32_t>(), T, k, num_experts, capacity, Execution(ids),
                    offsets.mutable_data_ptr<int32_t>(), tokens.mutable_data_ptr<int32_t>(),
                    slots.mutable_data_ptr<int32_t>());
#endif
}

}  // namespace moert
