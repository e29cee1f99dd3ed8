#include "moert/fused_experts.h"

#include <cstring>
#include <utility>

#include "binding/batch_invariant.h"
#include "binding/expert_weights.h"
#include "binding/ids.h"

namespace moert {

namespace {

// The arguments that forward and backward share, checked; holds the tensors that the pointers of `tokens` belong to.
struct Call {
  Tensor x, ids, weights;
  int64_t T, H, k, S;  // S slots
  RoutedRows tokens;
  Experts experts;
  Tensor offsets, slot_tokens, slots;  // of the plan, where there is one
  Tensor onto_rows, onto_scale, mix, constants;
};

// A plan that the caller has of the ids: all of it, or nothing.
struct GivenPlan {
  const std::optional<Tensor>&offsets, &tokens, &slots;
};

void take_plan(const GivenPlan& plan, [[maybe_unused]] int64_t E, [[maybe_unused]] Call& call) {
  if (!plan.offsets && !plan.tokens && !plan.slots) return;
#if defined(MOERT_CUDA)
  STD_TORCH_CHECK(false, "offsets, tokens and slots must be None on a GPU, which sorts the ids itself, got a plan");
#else
  STD_TORCH_CHECK(plan.offsets && plan.tokens && plan.slots,
                  "offsets, tokens and slots must be given together, got some of them");
  const Tensor &offsets = *plan.offsets, &tokens = *plan.tokens, &slots = *plan.slots;
  CHECK_DTYPE(offsets, Int);
  CHECK_DTYPE(tokens, Int);
  CHECK_DTYPE(slots, Int);
  CHECK_SAME_DEVICE(offsets, call.x);
  CHECK_SAME_DEVICE(tokens, call.x);
  CHECK_SAME_DEVICE(slots, call.x);
  STD_TORCH_CHECK(has_shape(offsets, {E + 1}), "offsets must have shape [E + 1=", E + 1, "], got ", shape(offsets));
  CHECK_DIM(tokens, 1, "[S]");
  STD_TORCH_CHECK(has_shape(slots, {call.T, call.k}), "slots must have shape [T=", call.T, ", k=", call.k, "], got ",
                  shape(slots));
  call.offsets = torch::stable::contiguous(offsets);
  call.slot_tokens = torch::stable::contiguous(tokens);
  call.slots = torch::stable::contiguous(slots);
  call.S = tokens.size(0);
  call.tokens.offsets = call.offsets.const_data_ptr<int32_t>();
  call.tokens.tokens = call.slot_tokens.const_data_ptr<int32_t>();
  call.tokens.slots = call.slots.const_data_ptr<int32_t>();
  call.tokens.S = call.S;
#endif
}

struct GivenOnto {
  const std::optional<Tensor>&rows, &scale, &mix, &constants;
};

void take_onto(const GivenOnto& onto, [[maybe_unused]] Call& call) {
#if defined(MOERT_CUDA)
  STD_TORCH_CHECK(!onto.rows && !onto.scale && !onto.mix && !onto.constants,
                  "onto_rows, onto_scale, mix and constants must be None on a GPU, got a tensor");
#else
  if (onto.rows) {
    const Tensor &onto_rows = *onto.rows, &x = call.x;
    CHECK_SAME_DEVICE(onto_rows, x);
    CHECK_SAME_DTYPE(onto_rows, x);
    STD_TORCH_CHECK(has_shape(onto_rows, {call.T, call.H}), "onto_rows must have shape [T=", call.T, ", H=", call.H,
                    "], got ", shape(onto_rows));
    call.onto_rows = dense_rows(onto_rows);
    call.tokens.onto.rows = rows_of(call.onto_rows);
  }
  if (onto.scale) {
    const Tensor &onto_scale = *onto.scale, &x = call.x;
    CHECK_SAME_DEVICE(onto_scale, x);
    CHECK_SCALE_DTYPE(onto_scale, x);
    STD_TORCH_CHECK(onto.rows && has_shape(onto_scale, {call.T}), "onto_scale must have shape [T=", call.T,
                    "], and onto_rows be given, got ", shape(onto_scale));
    call.onto_scale = scale_values(onto_scale, x);
    call.tokens.onto.scale = call.onto_scale.const_data_ptr();
  }
  STD_TORCH_CHECK(onto.mix.has_value() == onto.constants.has_value(),
                  "mix and constants must be given together, got one of them");
  if (!onto.mix) return;
  const Tensor &mix = *onto.mix, &constants = *onto.constants, &x = call.x;
  CHECK_SAME_DEVICE(mix, x);
  CHECK_SAME_DEVICE(constants, x);
  CHECK_SCALE_DTYPE(mix, x);
  CHECK_SAME_DTYPE(constants, x);
  STD_TORCH_CHECK(constants.dim() == 2 && constants.size(1) == call.H, "constants must have shape [C, H=", call.H,
                  "], got ", shape(constants));
  const int64_t C = constants.size(0);
  STD_TORCH_CHECK(has_shape(mix, {call.T, C}), "mix must have shape [T=", call.T, ", C=", C, "], got ", shape(mix));
  call.mix = scale_values(mix, x);
  call.constants = torch::stable::contiguous(constants);
  call.tokens.onto.C = C;
  call.tokens.onto.mix = call.mix.const_data_ptr();
  call.tokens.onto.constants = call.constants.const_data_ptr();
#endif
}

Call check(const Tensor& x, const Tensor& ids, const Tensor& weights, const Tensor& w1, const Tensor& w2,
           const std::optional<Tensor>& b1, const std::optional<Tensor>& b2, const std::string& activation,
           double alpha, double limit, bool transposed, bool interleaved, const std::string& scale_on,
           const GivenPlan& plan, bool panels = false) {
  check_routed(x, ids, weights);
  if (panels && in_panels(w1, w2))
    check_expert_panels(x, w1, w2);
  else
    check_expert_matrices(x, w1, w2);
  Experts experts = experts_of(x, w1, w2, b1, b2, activation, alpha, limit, transposed, interleaved);
  experts.weights.scale_on = scale_on_of(scale_on);
  const int64_t T = x.size(0), H = x.size(1), k = ids.size(1);
  Call call{dense_rows(x),     expert_ids(ids, w1.size(0)), scale_values(weights, x), T, H, k, T * k, {},
            std::move(experts)};
  call.tokens = {T,
                 k,
                 rows_of(call.x),
                 static_cast<const int32_t*>(call.ids.const_data_ptr()),
                 call.weights.const_data_ptr(),
                 batch_invariant};
  take_plan(plan, w1.size(0), call);
  return call;
}

}  // namespace

std::tuple<Tensor, Tensor> fused_experts(const Tensor& x, const Tensor& ids, const Tensor& weights, const Tensor& w1,
                                         const Tensor& w2, const std::optional<Tensor>& b1,
                                         const std::optional<Tensor>& b2, std::string activation, double alpha,
                                         double limit, bool transposed, bool interleaved, std::string scale_on,
                                         bool save, std::optional<Tensor> offsets, std::optional<Tensor> tokens,
                                         std::optional<Tensor> slots, std::optional<Tensor> onto_rows,
                                         std::optional<Tensor> onto_scale, std::optional<Tensor> mix,
                                         std::optional<Tensor> constants) {
  Call call = check(x, ids, weights, w1, w2, b1, b2, activation, alpha, limit, transposed, interleaved, scale_on,
                    {offsets, tokens, slots}, true);
  take_onto({onto_rows, onto_scale, mix, constants}, call);
  Tensor y = torch::stable::new_empty(x, {call.T, call.H});
  const int64_t width = call.experts.width;
  Tensor h = torch::stable::new_empty(x, {save ? call.S : 0, width});
  void* kept = save ? h.mutable_data_ptr() : nullptr;
  const Execution execution(x);
#if defined(MOERT_CUDA)
  Tensor workspace = bytes_beside(x, cuda::fused_experts_workspace(call.tokens, call.experts.weights));
  cuda::fused_experts(call.tokens, call.experts.weights, workspace.mutable_data_ptr(), execution, y.mutable_data_ptr(),
                      kept);
#else
  cpu::fused_experts(call.tokens, call.experts.weights, execution, y.mutable_data_ptr(), kept);
#endif
  return {y, h};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> fused_experts_backward(
    const Tensor& dy, const Tensor& x, const Tensor& ids, const Tensor& weights, const Tensor& w1, const Tensor& w2,
    const std::optional<Tensor>& b1, const std::optional<Tensor>& b2, const Tensor& h, std::string activation,
    double alpha, double limit, bool transposed, bool interleaved, std::string scale_on, int64_t needs,
    std::optional<Tensor> offsets, std::optional<Tensor> tokens, std::optional<Tensor> slots) {
  const Call call = check(x, ids, weights, w1, w2, b1, b2, activation, alpha, limit, transposed, interleaved, scale_on,
                          {offsets, tokens, slots});
  CHECK_SAME_DEVICE(dy, x);
  CHECK_SAME_DTYPE(dy, x);
  STD_TORCH_CHECK(has_shape(dy, {call.T, call.H}), "dy must have shape [T=", call.T, ", H=", call.H, "], got ",
                  shape(dy));
  CHECK_SAME_DEVICE(h, x);
  CHECK_SAME_DTYPE(h, x);
  const int64_t width = call.experts.width;
  STD_TORCH_CHECK(h.is_contiguous() && (has_shape(h, {call.S, width}) || has_shape(h, {0, width})),
                  "h must be what fused_experts returned, [S=", call.S, ", 2I] or [0, 2I], got ", shape(h));

  // needs has one bit per output, in order; what is not needed comes back empty.
  const auto output = [&](int64_t bit, const Tensor& like) {
    Tensor out = needs >> bit & 1 ? torch::stable::new_empty(like, like.sizes()) : torch::stable::new_empty(like, {0});
    return out;
  };
  Tensor dx = output(0, x), dw1 = output(2, w1), dw2 = output(3, w2);
  const int64_t weight_rows = needs >> 1 & 1 ? call.T : 0;
  Tensor dweights = torch::stable::new_empty(call.weights, {weight_rows, call.k});
  Tensor db1 = b1 ? output(4, *b1) : torch::stable::new_empty(x, {0});
  Tensor db2 = b2 ? output(5, *b2) : torch::stable::new_empty(x, {0});

  ExpertGradients gradients;
  const bool gated = call.experts.gated;
  const Halves& halves = call.experts.halves;
  if (needs & 1) gradients.dx = dx.mutable_data_ptr();
  if (needs >> 1 & 1) gradients.dweights = dweights.mutable_data_ptr();
  if (needs >> 2 & 1) {
    gradients.dgate = halves.matrix(dw1, false);
    if (gated) gradients.dup = halves.matrix(dw1, true);
  }
  if (needs >> 3 & 1) gradients.ddown = expert_matrix(dw2, transposed);
  if (b1 && needs >> 4 & 1) {
    gradients.dgate_bias = halves.vector(db1, false);
    if (gated) gradients.dup_bias = halves.vector(db1, true);
  }
  if (b2 && needs >> 5 & 1) gradients.ddown_bias = expert_vector(db2);

  const Tensor rows = dense_rows(dy);
  const void* kept = h.size(0) ? h.const_data_ptr() : nullptr;
  const Execution execution(x);
#if defined(MOERT_CUDA)
  Tensor workspace =
      bytes_beside(x, cuda::fused_experts_backward_workspace(call.tokens, call.experts.weights, kept, gradients));
  cuda::fused_experts_backward(rows_of(rows), call.tokens, call.experts.weights, kept, workspace.mutable_data_ptr(),
                               execution, gradients);
#else
  cpu::fused_experts_backward(rows_of(rows), call.tokens, call.experts.weights, kept, execution, gradients);
#endif
  if (weights.scalar_type() != dweights.scalar_type()) dweights = torch::stable::to(dweights, weights.scalar_type());
  return {dx, dweights, dw1, dw2, db1, db2};
}

STABLE_TORCH_LIBRARY_IMPL(moert, MOERT_DISPATCH_KEY, m) {
  m.impl("fused_experts", TORCH_BOX(&fused_experts));
  m.impl("fused_experts_backward", TORCH_BOX(&fused_experts_backward));
}

}  // namespace moert
