#include "moert/fused_experts.h"

#include <cstring>
#include <limits>
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

void take_plan(const GivenPlan& plan, int64_t E, Call& call) {
  if (!plan.offsets && !plan.tokens && !plan.slots) return;
  MOERT_CHECK(plan.offsets && plan.tokens && plan.slots,
              "offsets, tokens and slots must be given together, got some of them");
  const Tensor &offsets = *plan.offsets, &tokens = *plan.tokens, &slots = *plan.slots;
  CHECK_DTYPE(offsets, Int);
  CHECK_DTYPE(tokens, Int);
  CHECK_DTYPE(slots, Int);
  CHECK_SAME_DEVICE(offsets, call.x);
  CHECK_SAME_DEVICE(tokens, call.x);
  CHECK_SAME_DEVICE(slots, call.x);
  MOERT_CHECK(has_shape(offsets, {E + 1}), "offsets must have shape [E + 1=", E + 1, "], got ", shape(offsets));
  CHECK_DIM(tokens, 1, "[S]");
  MOERT_CHECK(tokens.numel() <= std::numeric_limits<int32_t>::max(),
              "tokens must have fewer than 2^31 elements, got shape ", shape(tokens));
  MOERT_CHECK(has_shape(slots, {call.T, call.k}), "slots must have shape [T=", call.T, ", k=", call.k, "], got ",
              shape(slots));
  call.offsets = torch::stable::contiguous(offsets);
  call.slot_tokens = torch::stable::contiguous(tokens);
  call.slots = torch::stable::contiguous(slots);
  call.S = tokens.size(0);
  call.tokens.offsets = call.offsets.const_data_ptr<int32_t>();
  call.tokens.tokens = call.slot_tokens.const_data_ptr<int32_t>();
  call.tokens.slots = call.slots.const_data_ptr<int32_t>();
  call.tokens.S = call.S;
}

struct GivenOnto {
  const std::optional<Tensor>&rows, &scale, &mix, &constants;
};

void take_onto(const GivenOnto& onto, Call& call) {
  if (onto.rows) {
    const Tensor &onto_rows = *onto.rows, &x = call.x;
    CHECK_SAME_DEVICE(onto_rows, x);
    CHECK_SAME_DTYPE(onto_rows, x);
    MOERT_CHECK(has_shape(onto_rows, {call.T, call.H}), "onto_rows must have shape [T=", call.T, ", H=", call.H,
                "], got ", shape(onto_rows));
    call.onto_rows = dense_rows(onto_rows);
    call.tokens.onto.rows = rows_of(call.onto_rows);
  }
  if (onto.scale) {
    const Tensor &onto_scale = *onto.scale, &x = call.x;
    CHECK_SAME_DEVICE(onto_scale, x);
    CHECK_SCALE_DTYPE(onto_scale, x);
    MOERT_CHECK(onto.rows && has_shape(onto_scale, {call.T}), "onto_scale must have shape [T=", call.T,
                "], and onto_rows be given, got ", shape(onto_scale));
    call.onto_scale = scale_values(onto_scale, x);
    call.tokens.onto.scale = call.onto_scale.const_data_ptr();
  }
  MOERT_CHECK(onto.mix.has_value() == onto.constants.has_value(),
              "mix and constants must be given together, got one of them");
  if (!onto.mix) return;
  const Tensor &mix = *onto.mix, &constants = *onto.constants, &x = call.x;
  CHECK_SAME_DEVICE(mix, x);
  CHECK_SAME_DEVICE(constants, x);
  CHECK_SCALE_DTYPE(mix, x);
  CHECK_SAME_DTYPE(constants, x);
  MOERT_CHECK(constants.dim() == 2 && constants.size(1) == call.H, "constants must have shape [C, H=", call.H,
              "], got ", shape(constants));
  const int64_t C = constants.size(0);
  MOERT_CHECK(has_shape(mix, {call.T, C}), "mix must have shape [T=", call.T, ", C=", C, "], got ", shape(mix));
  call.mix = scale_values(mix, x);
  call.constants = torch::stable::contiguous(constants);
  call.tokens.onto.C = C;
  call.tokens.onto.mix = call.mix.const_data_ptr();
  call.tokens.onto.constants = call.constants.const_data_ptr();
}

Call check(const Tensor& x, const Tensor& ids, const Tensor& weights, const Tensor& w1, const Tensor& w2,
           const std::optional<Tensor>& b1, const std::optional<Tensor>& b2, const std::string& activation,
           double alpha, double limit, bool transposed, bool interleaved, const std::string& scale_on,
           const GivenPlan& plan, bool tf32, bool panels = false) {
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
  call.tokens.tf32 = tf32;
  take_plan(plan, w1.size(0), call);
  return call;
}

// Tensors that gradients are added to, in the type of sums, where they are given.
struct MainGrads {
  const std::optional<Tensor>&w1, &w2, &b1, &b2;
};

// What gradients are of.
struct Inputs {
  const Tensor &x, &weights, &w1, &w2;
  const std::optional<Tensor>&b1, &b2;
};

void check_main_grad(const char* of, const std::optional<Tensor>& given, const Tensor* w, const Tensor& x) {
  if (!given) return;
  const ScalarType type = accumulate_type(x);
  MOERT_CHECK(w, of, "_main_grad must be None where ", of, " is, got a tensor");
  MOERT_CHECK(is_beside(*given, x), of,
              "_main_grad must be on " MOERT_DEVICE_NAME " like the other arguments, got another device");
  MOERT_CHECK(given->scalar_type() == type, of, "_main_grad must have dtype ", torch::headeronly::toString(type),
              ", got ", torch::headeronly::toString(given->scalar_type()));
  MOERT_CHECK(shape(*given) == shape(*w), of, "_main_grad must have the shape of ", of, ", ", shape(*w), ", got ",
              shape(*given));
  MOERT_CHECK(given->is_contiguous(), of, "_main_grad must be contiguous, got other strides");
}

void check_main_grads(const MainGrads& given, const Inputs& in) {
  check_main_grad("w1", given.w1, &in.w1, in.x);
  check_main_grad("w2", given.w2, &in.w2, in.x);
  check_main_grad("b1", given.b1, in.b1 ? &*in.b1 : nullptr, in.x);
  check_main_grad("b2", given.b2, in.b2 ? &*in.b2 : nullptr, in.x);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dy, const Inputs& in,
                                                                    const Call& call, const Tensor& h, bool transposed,
                                                                    int64_t needs, const MainGrads& main_grads) {
  const Tensor& x = in.x;
  CHECK_SAME_DEVICE(dy, x);
  CHECK_SAME_DTYPE(dy, x);
  MOERT_CHECK(has_shape(dy, {call.T, call.H}), "dy must have shape [T=", call.T, ", H=", call.H, "], got ", shape(dy));
  CHECK_SAME_DEVICE(h, x);
  CHECK_SAME_DTYPE(h, x);
  const int64_t width = call.experts.width;
  MOERT_CHECK(h.is_contiguous() && (has_shape(h, {call.S, width}) || has_shape(h, {0, width})),
              "h must be what fused_experts returned, [S=", call.S, ", 2I] or [0, 2I], got ", shape(h));
  check_main_grads(main_grads, in);

  // needs has one bit per output, in order; what is not needed, or is added to a main_grad, comes back empty.
  const auto wants = [&](int64_t bit) { return bool(needs >> bit & 1); };
  const auto output = [&](int64_t bit, const Tensor& like, const std::optional<Tensor>& main_grad) {
    return wants(bit) && !main_grad ? torch::stable::new_empty(like, like.sizes())
                                    : torch::stable::new_empty(like, {0});
  };
  Tensor dx = output(0, x, {}), dw1 = output(2, in.w1, main_grads.w1), dw2 = output(3, in.w2, main_grads.w2);
  Tensor dweights = torch::stable::new_empty(call.weights, {wants(1) ? call.T : 0, call.k});
  Tensor db1 = in.b1 ? output(4, *in.b1, main_grads.b1) : torch::stable::new_empty(x, {0});
  Tensor db2 = in.b2 ? output(5, *in.b2, main_grads.b2) : torch::stable::new_empty(x, {0});

  ExpertGradients gradients;
  gradients.accumulate = {main_grads.w1.has_value(), main_grads.w2.has_value(), main_grads.b1.has_value(),
                          main_grads.b2.has_value()};
  const bool gated = call.experts.gated;
  const Halves& halves = call.experts.halves;
  if (wants(0)) gradients.dx = dx.mutable_data_ptr();
  if (wants(1)) gradients.dweights = dweights.mutable_data_ptr();
  if (wants(2)) {
    const Tensor& to = main_grads.w1 ? *main_grads.w1 : dw1;
    gradients.dgate = halves.matrix(to, false);
    if (gated) gradients.dup = halves.matrix(to, true);
  }
  if (wants(3)) gradients.ddown = expert_matrix(main_grads.w2 ? *main_grads.w2 : dw2, transposed);
  if (in.b1 && wants(4)) {
    const Tensor& to = main_grads.b1 ? *main_grads.b1 : db1;
    gradients.dgate_bias = halves.vector(to, false);
    if (gated) gradients.dup_bias = halves.vector(to, true);
  }
  if (in.b2 && wants(5)) gradients.ddown_bias = expert_vector(main_grads.b2 ? *main_grads.b2 : db2);

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
  if (in.weights.scalar_type() != dweights.scalar_type())
    dweights = torch::stable::to(dweights, in.weights.scalar_type());
  return {dx, dweights, dw1, dw2, db1, db2};
}

}  // namespace

std::tuple<Tensor, Tensor> fused_experts(const Tensor& x, const Tensor& ids, const Tensor& weights, const Tensor& w1,
                                         const Tensor& w2, const std::optional<Tensor>& b1,
                                         const std::optional<Tensor>& b2, std::string activation, double alpha,
                                         double limit, bool transposed, bool interleaved, std::string scale_on,
                                         bool save, std::optional<Tensor> offsets, std::optional<Tensor> tokens,
                                         std::optional<Tensor> slots, std::optional<Tensor> onto_rows,
                                         std::optional<Tensor> onto_scale, std::optional<Tensor> mix,
                                         std::optional<Tensor> constants, std::optional<Tensor> w1_main_grad,
                                         std::optional<Tensor> w2_main_grad, std::optional<Tensor> b1_main_grad,
                                         std::optional<Tensor> b2_main_grad, bool tf32) {
  Call call = check(x, ids, weights, w1, w2, b1, b2, activation, alpha, limit, transposed, interleaved, scale_on,
                    {offsets, tokens, slots}, tf32, true);
  take_onto({onto_rows, onto_scale, mix, constants}, call);
  // What backward will add to is refused here, before it is too late.
  check_main_grads({w1_main_grad, w2_main_grad, b1_main_grad, b2_main_grad}, {x, weights, w1, w2, b1, b2});
  Tensor y = torch::stable::new_empty(x, {call.T, call.H});
  const int64_t width = call.experts.width;
  Tensor h = torch::stable::new_empty(x, {save ? call.S : 0, width});
  void* kept = save ? h.mutable_data_ptr() : nullptr;  // null too where there is no slot
  const Execution execution(x);
#if defined(MOERT_CUDA)
  call.tokens.fused_combine = cuda::is_on("MOERT_FUSED_COMBINE");  // once for the workspace and for what lies in it
  Tensor workspace = bytes_beside(x, cuda::fused_experts_workspace(call.tokens, call.experts.weights, kept));
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
    std::optional<Tensor> offsets, std::optional<Tensor> tokens, std::optional<Tensor> slots, bool tf32) {
  const Call call = check(x, ids, weights, w1, w2, b1, b2, activation, alpha, limit, transposed, interleaved, scale_on,
                          {offsets, tokens, slots}, tf32);
  return backward(dy, {x, weights, w1, w2, b1, b2}, call, h, transposed, needs, {{}, {}, {}, {}});
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> fused_experts_backward_(
    const Tensor& dy, const Tensor& x, const Tensor& ids, const Tensor& weights, const Tensor& w1, const Tensor& w2,
    const std::optional<Tensor>& b1, const std::optional<Tensor>& b2, const Tensor& h,
    std::optional<Tensor> w1_main_grad, std::optional<Tensor> w2_main_grad, std::optional<Tensor> b1_main_grad,
    std::optional<Tensor> b2_main_grad, std::string activation, double alpha, double limit, bool transposed,
    bool interleaved, std::string scale_on, int64_t needs, std::optional<Tensor> offsets, std::optional<Tensor> tokens,
    std::optional<Tensor> slots, bool tf32) {
  const Call call = check(x, ids, weights, w1, w2, b1, b2, activation, alpha, limit, transposed, interleaved, scale_on,
                          {offsets, tokens, slots}, tf32);
  return backward(dy, {x, weights, w1, w2, b1, b2}, call, h, transposed, needs,
                  {w1_main_grad, w2_main_grad, b1_main_grad, b2_main_grad});
}

STABLE_TORCH_LIBRARY_IMPL(moert, MOERT_DISPATCH_KEY, m) {
  m.impl("fused_experts", TORCH_BOX(&fused_experts));
  m.impl("fused_experts_backward", TORCH_BOX(&fused_experts_backward));
  m.impl("fused_experts_backward_", TORCH_BOX(&fused_experts_backward_));
}

}  // namespace moert
