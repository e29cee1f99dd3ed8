#include "moert/gating.h"

#include <tuple>

#include "binding/device.h"

namespace moert {

namespace {

Score parse_score(const std::string& score) {
  if (score == "softmax") return Score::softmax;
  if (score == "softmax_over_topk") return Score::softmax_over_topk;
  if (score == "sigmoid") return Score::sigmoid;
  if (score == "relu") return Score::relu;
  MOERT_CHECK(score == "identity", "score must be softmax, softmax_over_topk, sigmoid, relu or identity, got ", score);
  return Score::identity;
}

GroupScore parse_group_score(const std::string& group_score) {
  if (group_score == "top2") return GroupScore::top2;
  MOERT_CHECK(group_score == "max", "group_score must be top2 or max, got ", group_score);
  return GroupScore::max;
}

void check_logits(const Tensor& logits) {
  CHECK_DIM(logits, 2, "[T, E]");
  CHECK_FLOAT(logits);
  CHECK_DEVICE(logits);
}

// The bias in the type of the arithmetic, dense.
Tensor check_bias(const Tensor& bias, const Tensor& logits) {
  const int64_t E = logits.size(1);
  MOERT_CHECK(has_shape(bias, {E}), "bias must have shape [E=", E, "], got ", shape(bias));
  const bool fits = bias.scalar_type() == ScalarType::Float || bias.scalar_type() == accumulate_type(logits);
  MOERT_CHECK(fits, "bias must have dtype Float (or Double for Double logits), got ",
              torch::headeronly::toString(bias.scalar_type()));
  CHECK_SAME_DEVICE(bias, logits);
  return torch::stable::contiguous(torch::stable::to(bias, accumulate_type(logits)));
}

GatingOptions check_groups(int64_t E, int64_t k, int64_t num_groups, int64_t topk_groups,
                           const std::string& group_score) {
  GatingOptions options;
  MOERT_CHECK(num_groups >= 1 && E % num_groups == 0, "num_groups must divide E=", E, ", got ", num_groups);
  MOERT_CHECK(1 <= topk_groups && topk_groups <= num_groups, "topk_groups must be in [1, num_groups=", num_groups,
              "], got ", topk_groups);
  options.num_groups = num_groups;
  options.topk_groups = topk_groups;
  options.group_score = parse_group_score(group_score);
  const int64_t size = E / num_groups;
  MOERT_CHECK(options.group_score == GroupScore::max || num_groups == 1 || size >= 2,
              "num_groups must leave two experts to a group for group_score top2, got ", num_groups, " for E=", E);
  MOERT_CHECK(0 <= k && k <= E, "k must be in [0, E=", E, "], got ", k);
  MOERT_CHECK(k <= topk_groups * size, "k must be at most the ", topk_groups * size, " experts of ", topk_groups,
              " groups, got ", k);
  return options;
}

}  // namespace

std::tuple<Tensor, Tensor> topk_gating(const Tensor& logits, int64_t k, std::string score, std::optional<Tensor> bias,
                                       bool renormalize, double scale, int64_t num_groups, int64_t topk_groups,
                                       std::string group_score) {
  check_logits(logits);
  const int64_t T = logits.size(0), E = logits.size(1);
  GatingOptions options = check_groups(E, k, num_groups, topk_groups, group_score);
  options.score = parse_score(score);
  options.renormalize = renormalize;
  options.scale = scale;
  if (bias) bias = check_bias(*bias, logits);

  const Tensor ready = dense_rows(logits);
  Tensor weights = torch::stable::new_empty(logits, {T, k}, accumulate_type(logits));
  Tensor ids = torch::stable::new_empty(logits, {T, k}, ScalarType::Int);
  device::topk_gating(ready.const_data_ptr(), dtype(logits), ready.stride(0), bias ? bias->const_data_ptr() : nullptr,
                      T, E, k, options, Execution(logits), weights.mutable_data_ptr(), ids.mutable_data_ptr<int32_t>());
  return {weights, ids};
}

Tensor topk_gating_backward(const Tensor& dweights, const Tensor& logits, const Tensor& ids, std::string score,
                            bool renormalize, double scale) {
  check_logits(logits);
  const int64_t T = logits.size(0), E = logits.size(1);
  MOERT_CHECK(ids.dim() == 2 && ids.size(0) == T, "ids must have shape [T=", T, ", k], got ", shape(ids));
  CHECK_DTYPE(ids, Int);
  CHECK_SAME_DEVICE(ids, logits);
  const int64_t k = ids.size(1);
  MOERT_CHECK(has_shape(dweights, {T, k}), "dweights must have shape [T=", T, ", k=", k, "], got ", shape(dweights));
  MOERT_CHECK(dweights.scalar_type() == accumulate_type(logits), "dweights must have dtype ",
              torch::headeronly::toString(accumulate_type(logits)), ", got ",
              torch::headeronly::toString(dweights.scalar_type()));
  CHECK_SAME_DEVICE(dweights, logits);
  GatingOptions options;
  options.score = parse_score(score);
  options.renormalize = renormalize;
  options.scale = scale;

  const Tensor ready = dense_rows(logits), dense_ids = torch::stable::contiguous(ids),
               dense_dweights = torch::stable::contiguous(dweights);
  Tensor dlogits = torch::stable::new_empty(logits, {T, E});
  device::topk_gating_backward(dense_dweights.const_data_ptr(), ready.const_data_ptr(), dtype(logits), ready.stride(0),
                               dense_ids.const_data_ptr<int32_t>(), T, E, k, options, Execution(logits),
                               dlogits.mutable_data_ptr());
  return dlogits;
}

STABLE_TORCH_LIBRARY_IMPL(moert, MOERT_DISPATCH_KEY, m) {
  m.impl("topk_gating", TORCH_BOX(&topk_gating));
  m.impl("topk_gating_backward", TORCH_BOX(&topk_gating_backward));
}

}  // namespace moert
