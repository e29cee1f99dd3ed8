#include "moert/dispatch.h"

#include <tuple>

#include "binding/experts.h"
#include "binding/ids.h"

namespace moert {

namespace {

// values [E] of one expert each, side by side.
Tensor check_map(const Tensor& values, const char* name, const Tensor& first) {
  STD_TORCH_CHECK(is_beside(values, first), name,
                  " must be on " MOERT_DEVICE_NAME " like the other arguments, got another device");
  STD_TORCH_CHECK(values.dim() == 1 && values.numel() > 0, name, " must be [E] with E > 0, got shape ", shape(values));
  STD_TORCH_CHECK(values.scalar_type() == ScalarType::Int, name, " must have dtype Int, got ",
                  torch::headeronly::toString(values.scalar_type()));
  return torch::stable::contiguous(values);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> dispatch_plan(const Tensor& ids, const Tensor& expert_to_rank, int64_t num_ranks) {
  CHECK_DEVICE(ids);
  const Tensor ranks = check_map(expert_to_rank, "expert_to_rank", ids);
  STD_TORCH_CHECK(num_ranks >= 1 && num_ranks < std::numeric_limits<int32_t>::max(),
                  "num_ranks must be in [1, 2^31 - 2], got ", num_ranks);
  const int64_t E = ranks.numel();
  const Tensor ready = expert_ids(ids, E);
  const int64_t T = ids.size(0), k = ids.size(1);
  Tensor offsets = torch::stable::new_empty(ready, {num_ranks + 1}, ScalarType::Int);
  Tensor tokens = torch::stable::new_empty(ready, {T * k}, ScalarType::Int);
  Tensor slots = torch::stable::new_empty(ready, {T, k}, ScalarType::Int);
#if defined(MOERT_CUDA)
  Tensor workspace = bytes_beside(ids, cuda::dispatch_plan_workspace(T, k, num_ranks));
  cuda::dispatch_plan(ready.const_data_ptr<int32_t>(), T, k, ranks.const_data_ptr<int32_t>(), E, num_ranks,
                      workspace.mutable_data_ptr(), Execution(ids), offsets.mutable_data_ptr<int32_t>(),
                      tokens.mutable_data_ptr<int32_t>(), slots.mutable_data_ptr<int32_t>());
#else
  cpu::dispatch_plan(ready.const_data_ptr<int32_t>(), T, k, ranks.const_data_ptr<int32_t>(), E, num_ranks,
                     Execution(ids), offsets.mutable_data_ptr<int32_t>(), tokens.mutable_data_ptr<int32_t>(),
                     slots.mutable_data_ptr<int32_t>());
#endif
  return {offsets, tokens, slots};
}

Tensor dispatch_pack(const Tensor& x, const Tensor& weights, const Tensor& ids, const Tensor& expert_to_rank,
                     const Tensor& local_ids, const Tensor& offsets, const Tensor& tokens) {
  check_routed(x, ids, weights);
  const Tensor ranks = check_map(expert_to_rank, "expert_to_rank", x), locals = check_map(local_ids, "local_ids", x);
  const int64_t E = ranks.numel();
  STD_TORCH_CHECK(locals.numel() == E, "local_ids must have shape [E=", E, "], got ", shape(local_ids));
  CHECK_SAME_DEVICE(offsets, x);
  CHECK_DTYPE(offsets, Int);
  STD_TORCH_CHECK(offsets.dim() == 1 && offsets.numel() >= 1, "offsets must be [R+1], got shape ", shape(offsets));
  CHECK_SAME_DEVICE(tokens, x);
  CHECK_DTYPE(tokens, Int);
  CHECK_DIM(tokens, 1, "[N]");

  const Tensor rows = dense_rows(x), scale = torch::stable::contiguous(weights), ready = expert_ids(ids, E);
  const Tensor starts = torch::stable::contiguous(offsets), of = torch::stable::contiguous(tokens);
  const int64_t H = x.size(1), k = ids.size(1), N = tokens.numel(), weight_size = size_of(dtype(scale));
  const RecordLayout layout = record_layout(H, size_of(dtype(x)), k, weight_size);
  Tensor records = torch::stable::new_empty(x, {N, layout.bytes}, ScalarType::Byte);
  const Packing packing{rows.const_data_ptr(),
                        rows.stride(0),
                        dtype(x),
                        scale.const_data_ptr(),
                        weight_size,
                        ready.const_data_ptr<int32_t>(),
                        ranks.const_data_ptr<int32_t>(),
                        locals.const_data_ptr<int32_t>(),
                        starts.const_data_ptr<int32_t>(),
                        of.const_data_ptr<int32_t>(),
                        x.size(0),
                        H,
                        k,
                        E,
                        offsets.numel() - 1,
                        N};
  device::dispatch_pack(packing, Execution(x), records.mutable_data_ptr());
  return records;
}

STABLE_TORCH_LIBRARY_IMPL(moert, MOERT_DISPATCH_KEY, m) {
  m.impl("dispatch_plan", TORCH_BOX(&dispatch_plan));
  m.impl("dispatch_pack", TORCH_BOX(&dispatch_pack));
}

}  // namespace moert
