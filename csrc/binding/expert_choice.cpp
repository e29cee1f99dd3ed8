#include "moert/expert_choice.h"

#include <tuple>

#include "binding/ids.h"
#include "binding/plan.h"

namespace moert {

namespace {

Tensor dense_long(const Tensor& x) { return torch::stable::contiguous(torch::stable::to(x, ScalarType::Long)); }

struct Choice {
  Tensor scores, segments, capacity;
  int64_t T, E, D, k, S;
};

struct Chosen {
  Tensor weights, ids, offsets, tokens, slots;
};

#if defined(MOERT_CUDA)

// The first S of the tokens, or all and -1 after them.
Tensor in_slots(Tensor tokens, int64_t S) {
  Tensor out = torch::stable::new_empty(tokens, {S});
  torch::stable::fill_(out, -1);
  const int64_t n = std::min(S, tokens.numel());
  Tensor first = torch::stable::narrow(out, 0, 0, n);
  torch::stable::copy_(first, torch::stable::narrow(tokens, 0, 0, n));
  return out;
}

// Of more choices than slots, which only the GPU sees, the last are in no slot.
void choose(const Choice& c, Chosen& out) {
  const Tensor& scores = c.scores;
  Tensor workspace = bytes_beside(scores, cuda::expert_choice_workspace(c.E, c.D));
  cuda::expert_choice(scores.const_data_ptr(), dtype(scores), scores.stride(0), c.segments.const_data_ptr<int64_t>(),
                      c.capacity.const_data_ptr<int64_t>(), c.T, c.E, c.D, c.k, workspace.mutable_data_ptr(),
                      Execution(scores), out.weights.mutable_data_ptr(), out.ids.mutable_data_ptr<int32_t>());
  if (c.E == 0) {
    torch::stable::fill_(out.offsets, 0);
    torch::stable::fill_(out.tokens, -1);
    return;
  }
  const bool all = c.S == c.T * c.k;
  Tensor tokens = all ? out.tokens : torch::stable::new_empty(out.ids, {c.T * c.k});
  sort_choices(out.ids, c.E, -1, out.offsets, tokens, out.slots);
  if (!all) out.tokens = in_slots(tokens, c.S);
}

#else

void choose(const Choice& c, Chosen& out) {
  const Tensor& scores = c.scores;
  cpu::expert_choice(scores.const_data_ptr(), dtype(scores), scores.stride(0), c.segments.const_data_ptr<int64_t>(),
                     c.capacity.const_data_ptr<int64_t>(), c.T, c.E, c.D, c.k, c.S, Execution(scores),
                     out.weights.mutable_data_ptr(), out.ids.mutable_data_ptr<int32_t>(),
                     out.offsets.mutable_data_ptr<int32_t>(), out.tokens.mutable_data_ptr<int32_t>(),
                     out.slots.mutable_data_ptr<int32_t>());
}

#endif

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> expert_choice(const Tensor& scores, const Tensor& segments,
                                                                 const Tensor& capacity, int64_t max_choices,
                                                                 std::optional<int64_t> max_slots) {
  CHECK_DIM(scores, 2, "[T, E]");
  CHECK_FLOAT(scores);
  CHECK_DEVICE(scores);
  const int64_t T = scores.size(0), E = scores.size(1), limit = std::numeric_limits<int32_t>::max();
  MOERT_CHECK(has_shape(segments, {T}), "segments must have shape [T=", T, "], got ", shape(segments));
  MOERT_CHECK(is_integer(segments.scalar_type()), "segments must have an integer dtype, got ",
              torch::headeronly::toString(segments.scalar_type()));
  CHECK_SAME_DEVICE(segments, scores);
  MOERT_CHECK(capacity.dim() == 2 && capacity.size(1) == E, "capacity must have shape [D, E=", E, "], got ",
              shape(capacity));
  MOERT_CHECK(is_integer(capacity.scalar_type()), "capacity must have an integer dtype, got ",
              torch::headeronly::toString(capacity.scalar_type()));
  CHECK_SAME_DEVICE(capacity, scores);
  MOERT_CHECK(0 <= max_choices && max_choices <= E, "max_choices must be in [0, E=", E, "], got ", max_choices);
  MOERT_CHECK(T <= limit / std::max<int64_t>(1, max_choices),
              "scores must have fewer than 2^31 / max_choices tokens, got shape ", shape(scores));
  MOERT_CHECK(!max_slots || (0 <= *max_slots && *max_slots <= limit), "max_slots must be in [0, 2^31), got ",
              *max_slots);

  const int64_t k = max_choices, S = max_slots.value_or(T * k);
  const Choice choice{dense_rows(scores), dense_long(segments), dense_long(capacity), T, E, capacity.size(0), k, S};
  const auto ints = [&](std::initializer_list<int64_t> sizes) {
    return torch::stable::new_empty(scores, sizes, ScalarType::Int);
  };
  Chosen out{torch::stable::new_empty(scores, {T, k}, accumulate_type(scores)), ints({T, k}), ints({E + 1}), ints({S}),
             ints({T, k})};
  choose(choice, out);
  return {out.weights, out.ids, out.offsets, out.tokens, out.slots};
}

STABLE_TORCH_LIBRARY_IMPL(moert, MOERT_DISPATCH_KEY, m) { m.impl("expert_choice", TORCH_BOX(&expert_choice)); }

}  // namespace moert
