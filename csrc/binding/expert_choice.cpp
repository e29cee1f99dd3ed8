#include "moert/expert_choice.h"

#include <tuple>

#include "binding/check.h"
#include "binding/ids.h"

namespace moert {

namespace {

Tensor dense_long(const Tensor& x) { return torch::stable::contiguous(torch::stable::to(x, ScalarType::Long)); }

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> expert_choice_cpu(const Tensor& scores, const Tensor& segments,
                                                                     const Tensor& capacity, int64_t max_choices,
                                                                     std::optional<int64_t> max_slots) {
  CHECK_DIM(scores, 2, "[T, E]");
  CHECK_FLOAT(scores);
  const int64_t T = scores.size(0), E = scores.size(1), limit = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(has_shape(segments, {T}), "segments must have shape [T=", T, "], got ", shape(segments));
  STD_TORCH_CHECK(is_integer(segments.scalar_type()), "segments must have an integer dtype, got ",
                  torch::headeronly::toString(segments.scalar_type()));
  CHECK_DEVICE(segments);
  STD_TORCH_CHECK(capacity.dim() == 2 && capacity.size(1) == E, "capacity must have shape [D, E=", E, "], got ",
                  shape(capacity));
  STD_TORCH_CHECK(is_integer(capacity.scalar_type()), "capacity must have an integer dtype, got ",
                  torch::headeronly::toString(capacity.scalar_type()));
  CHECK_DEVICE(capacity);
  STD_TORCH_CHECK(0 <= max_choices && max_choices <= E, "max_choices must be in [0, E=", E, "], got ", max_choices);
  STD_TORCH_CHECK(T <= limit / std::max<int64_t>(1, max_choices),
                  "scores must have fewer than 2^31 / max_choices tokens, got shape ", shape(scores));
  STD_TORCH_CHECK(!max_slots || (0 <= *max_slots && *max_slots <= limit), "max_slots must be in [0, 2^31), got ",
                  *max_slots);

  const Tensor ready = dense_rows(scores), segment = dense_long(segments), room = dense_long(capacity);
  Tensor weights = torch::stable::new_empty(scores, {T, max_choices}, accumulate_type(scores));
  Tensor ids = torch::stable::new_empty(scores, {T, max_choices}, ScalarType::Int);
  const int64_t S = max_slots.value_or(T * max_choices);
  Tensor offsets = torch::stable::new_empty(scores, {E + 1}, ScalarType::Int);
  Tensor tokens = torch::stable::new_empty(scores, {S}, ScalarType::Int);
  Tensor slots = torch::stable::new_empty(scores, {T, max_choices}, ScalarType::Int);
  cpu::expert_choice(ready.const_data_ptr(), dtype(scores), ready.stride(0), segment.const_data_ptr<int64_t>(),
                     room.const_data_ptr<int64_t>(), T, E, capacity.size(0), max_choices, S,
                     torch::stable::get_num_threads(), weights.mutable_data_ptr(), ids.mutable_data_ptr<int32_t>(),
                     offsets.mutable_data_ptr<int32_t>(), tokens.mutable_data_ptr<int32_t>(),
                     slots.mutable_data_ptr<int32_t>());
  return {weights, ids, offsets, tokens, slots};
}

STABLE_TORCH_LIBRARY_IMPL(moert, CPU, m) { m.impl("expert_choice", TORCH_BOX(&expert_choice_cpu)); }

}  // namespace moert
