#include "moert/fused_experts.h"

#include <cstring>
#include <utility>

#include "binding/experts.h"
#include "binding/ids.h"

namespace moert {

namespace {

constexpr std::pair<const char*, Act> kActivations[] = {
    {"identity", Act::identity},
    {"silu", Act::silu},
    {"gelu", Act::gelu},
    {"gelu_tanh", Act::gelu_tanh},
    {"relu", Act::relu},
    {"relu2", Act::relu2},
    {"swiglu", Act::swiglu},
    {"geglu", Act::geglu},
    {"geglu_tanh", Act::geglu_tanh},
    {"reglu", Act::reglu},
    {"swiglu_clamped", Act::swiglu_clamped},
    {"swiglu_oai", Act::swiglu_oai},
};

Activation activation_of(const std::string& name, double alpha, double limit) {
  std::string known;
  for (const auto& [known_name, act] : kActivations) {
    if (name == known_name) return {act, alpha, limit};
    known += (known.empty() ? "" : ", ") + std::string(known_name);
  }
  STD_TORCH_CHECK(false, "activation must be one of ", known, ", got ", name);
}

// The arguments that forward and backward share, checked; holds the tensors that the pointers of `tokens` and
// `experts` belong to.
struct Call {
  Tensor x, ids, weights;
  std::optional<Tensor> b1, b2;
  int64_t T, H, k, E, I, width;  // width: 2I where the activation is gated, else I
  RoutedRows tokens;
  ExpertWeights experts;
};

void check_bias(const char* name, const Tensor& bias, const Tensor& x, int64_t E, int64_t N, const char* letter) {
  STD_TORCH_CHECK(has_shape(bias, {E, N}), name, " must have shape [E=", E, ", ", letter, "=", N, "], got ",
                  shape(bias));
  STD_TORCH_CHECK(bias.scalar_type() == x.scalar_type(), name, " must have the dtype of x, ",
                  torch::headeronly::toString(x.scalar_type()), ", got ",
                  torch::headeronly::toString(bias.scalar_type()));
  STD_TORCH_CHECK(bias.is_cpu(), name, " must be on the CPU like x, got another device");
}

// The gate or up half of w1 [E, 2I, H] (or transposed, or interleaved).
ExpertMatrix half_of(const Tensor& w1, const Call& call, bool transposed, bool interleaved, bool up) {
  ExpertMatrix half = expert_matrix(w1, transposed);
  const int64_t step = half.row_stride;
  if (up) half.data = static_cast<const char*>(half.data) + (interleaved ? step : call.I * step) * size_of(half.dtype);
  if (interleaved) half.row_stride = 2 * step;
  return half;
}

ExpertVector bias_half_of(const std::optional<Tensor>& b1, const Call& call, bool interleaved, bool up) {
  ExpertVector half = expert_vector(b1);
  if (half.data && up)
    half.data = static_cast<const char*>(half.data) + (interleaved ? 1 : call.I) * size_of(half.dtype);
  return half;
}

void check_shapes(const Tensor& x, const Tensor& ids, const Tensor& weights, const Tensor& w1, const Tensor& w2) {
  CHECK_DIM(x, 2, "[T, H]");
  CHECK_FLOAT(x);
  CHECK_CPU(x);
  CHECK_DIM(ids, 2, "[T, k]");
  CHECK_DIM(weights, 2, "[T, k]");
  CHECK_CPU(weights);
  CHECK_DIM(w1, 3, "[E, 2I, H]");
  CHECK_CPU(w1);
  CHECK_SAME_DTYPE(w1, x);
  CHECK_DIM(w2, 3, "[E, H, I]");
  CHECK_CPU(w2);
  CHECK_SAME_DTYPE(w2, x);
  STD_TORCH_CHECK(ids.size(0) == x.size(0), "ids must have shape [T=", x.size(0), ", k], got ", shape(ids));
  STD_TORCH_CHECK(has_shape(weights, {ids.size(0), ids.size(1)}), "weights must have the shape of ids, ", shape(ids),
                  ", got ", shape(weights));
  CHECK_SCALE_DTYPE(weights, x);
}

Call check(const Tensor& x, const Tensor& ids, const Tensor& weights, const Tensor& w1, const Tensor& w2,
           const std::optional<Tensor>& b1, const std::optional<Tensor>& b2, const std::string& activation,
           double alpha, double limit, bool transposed, bool interleaved, const std::string& scale_on) {
  check_shapes(x, ids, weights, w1, w2);
  const Activation act = activation_of(activation, alpha, limit);
  const bool gated = is_gated(act.act);
  const int64_t T = x.size(0), H = x.size(1), k = ids.size(1), E = w1.size(0), width = w1.size(transposed ? 2 : 1);
  STD_TORCH_CHECK(w1.size(transposed ? 1 : 2) == H, "w1 must have shape ", transposed ? "[E, H=" : "[E, 2I, H=", H,
                  transposed ? ", 2I], got " : "], got ", shape(w1));
  STD_TORCH_CHECK(!gated || width % 2 == 0, "w1 must have an even 2I for the gated activation ", activation, ", got ",
                  shape(w1));
  const int64_t I = gated ? width / 2 : width;
  STD_TORCH_CHECK(transposed ? has_shape(w2, {E, I, H}) : has_shape(w2, {E, H, I}), "w2 must have shape [E=", E, ", ",
                  transposed ? "I=" : "H=", transposed ? I : H, ", ", transposed ? "H=" : "I=", transposed ? H : I,
                  "], got ", shape(w2));
  if (b1) check_bias("b1", *b1, x, E, width, gated ? "2I" : "I");
  if (b2) check_bias("b2", *b2, x, E, H, "H");
  const ScaleOn on = scale_on_of(scale_on);

  Call call{dense_rows(x), expert_ids(ids, E), scale_values(weights, x), {}, {}, T, H, k, E, I, width, {}, {}};
  if (b1) call.b1 = dense_rows(*b1);
  if (b2) call.b2 = dense_rows(*b2);
  call.tokens = {T, k, rows_of(call.x), static_cast<const int32_t*>(call.ids.const_data_ptr()),
                 call.weights.const_data_ptr()};
  const bool alternate = gated && interleaved;
  call.experts = {E,
                  H,
                  I,
                  half_of(w1, call, transposed, alternate, false),
                  gated ? half_of(w1, call, transposed, alternate, true) : ExpertMatrix{},
                  expert_matrix(w2, transposed),
                  bias_half_of(call.b1, call, alternate, false),
                  gated ? bias_half_of(call.b1, call, alternate, true) : ExpertVector{},
                  alternate ? 2 : 1,
                  expert_vector(call.b2),
                  act,
                  on};
  return call;
}

}  // namespace

std::tuple<Tensor, Tensor> fused_experts_cpu(const Tensor& x, const Tensor& ids, const Tensor& weights,
                                             const Tensor& w1, const Tensor& w2, const std::optional<Tensor>& b1,
                                             const std::optional<Tensor>& b2, std::string activation, double alpha,
                                             double limit, bool transposed, bool interleaved, std::string scale_on,
                                             bool save) {
  const Call call = check(x, ids, weights, w1, w2, b1, b2, activation, alpha, limit, transposed, interleaved, scale_on);
  Tensor y = torch::stable::new_empty(x, {call.T, call.H});
  Tensor h =
      save ? torch::stable::new_zeros(x, {call.T * call.k, call.width}) : torch::stable::new_empty(x, {0, call.width});
  cpu::fused_experts(call.tokens, call.experts, torch::stable::get_num_threads(), y.mutable_data_ptr(),
                     save ? h.mutable_data_ptr() : nullptr);
  return {y, h};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> fused_experts_backward_cpu(
    const Tensor& dy, const Tensor& x, const Tensor& ids, const Tensor& weights, const Tensor& w1, const Tensor& w2,
    const std::optional<Tensor>& b1, const std::optional<Tensor>& b2, const Tensor& h, std::string activation,
    double alpha, double limit, bool transposed, bool interleaved, std::string scale_on, int64_t needs) {
  const Call call = check(x, ids, weights, w1, w2, b1, b2, activation, alpha, limit, transposed, interleaved, scale_on);
  CHECK_CPU(dy);
  CHECK_SAME_DTYPE(dy, x);
  STD_TORCH_CHECK(has_shape(dy, {call.T, call.H}), "dy must have shape [T=", call.T, ", H=", call.H, "], got ",
                  shape(dy));
  CHECK_SAME_DTYPE(h, x);
  STD_TORCH_CHECK(h.is_contiguous() && (has_shape(h, {call.T * call.k, call.width}) || has_shape(h, {0, call.width})),
                  "h must be what fused_experts returned, [T*k, 2I] or [0, 2I], got ", shape(h));

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

  cpu::ExpertGradients gradients;
  const bool gated = is_gated(call.experts.activation.act), alternate = gated && interleaved;
  if (needs & 1) gradients.dx = dx.mutable_data_ptr();
  if (needs >> 1 & 1) gradients.dweights = dweights.mutable_data_ptr();
  if (needs >> 2 & 1) {
    gradients.dgate = half_of(dw1, call, transposed, alternate, false);
    if (gated) gradients.dup = half_of(dw1, call, transposed, alternate, true);
  }
  if (needs >> 3 & 1) gradients.ddown = expert_matrix(dw2, transposed);
  if (b1 && needs >> 4 & 1) {
    gradients.dgate_bias = bias_half_of(db1, call, alternate, false);
    if (gated) gradients.dup_bias = bias_half_of(db1, call, alternate, true);
  }
  if (b2 && needs >> 5 & 1) gradients.ddown_bias = expert_vector(db2);

  const Tensor rows = dense_rows(dy);
  cpu::fused_experts_backward(rows_of(rows), call.tokens, call.experts, h.size(0) ? h.const_data_ptr() : nullptr,
                              torch::stable::get_num_threads(), gradients);
  if (weights.scalar_type() != dweights.scalar_type()) dweights = torch::stable::to(dweights, weights.scalar_type());
  return {dx, dweights, dw1, dw2, db1, db2};
}

STABLE_TORCH_LIBRARY_IMPL(moert, CPU, m) {
  m.impl("fused_experts", TORCH_BOX(&fused_experts_cpu));
  m.impl("fused_experts_backward", TORCH_BOX(&fused_experts_backward_cpu));
}

}  // namespace moert
