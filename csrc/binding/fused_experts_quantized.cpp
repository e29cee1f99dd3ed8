#include "moert/fused_experts_quantized.h"

#include "binding/expert_weights.h"
#include "binding/ids.h"

namespace moert {

namespace {

Format format_of(const char* name, const std::string& format) {
  std::string known;
  for (int i = 0; i < kFormats; ++i) {
    if (format == cpu::name(Format(i))) return Format(i);
    known += (i ? ", " : "") + std::string(cpu::name(Format(i)));
  }
  STD_TORCH_CHECK(false, name, " must be one of ", known, ", got ", format);
}

Precision precision_of(const std::string& name, const Packing& w1, const Packing& w2) {
  if (name == "auto") return default_precision(w1, w2);
  for (const Precision p : {Precision::full, Precision::int8, Precision::int8_group32})
    if (name == moert::name(p)) return p;
  STD_TORCH_CHECK(false, "precision must be auto, full, int8 or int8_group32, got ", name);
}

// The arrays of one packed matrix, checked; `n` is "1" or "2".
struct Packed {
  Tensor codes, scales;
  std::optional<Tensor> zeros;
  PackedMatrix matrix;
};

Packed packed_of(const std::string& n, const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& zeros,
                 const std::string& format, int64_t group, int64_t columns) {
  STD_TORCH_CHECK(codes.dim() == 3, "codes", n, " must be [E, rows, bytes], got shape ", shape(codes));
  const Packing p{format_of(("format" + n).c_str(), format), codes.size(1), columns, group};
  cpu::check_packing(p);
  const auto check = [&](const std::string& name, const Tensor& x, int64_t width, ScalarType type) {
    STD_TORCH_CHECK(has_shape(x, {codes.size(0), p.rows, width}), name, " must have shape [E=", codes.size(0),
                    ", rows=", p.rows, ", ", width, "] for ", columns, " columns of ", format, ", got ", shape(x));
    STD_TORCH_CHECK(x.scalar_type() == type, name, " must have dtype ", torch::headeronly::toString(type), " for ",
                    format, ", got ", torch::headeronly::toString(x.scalar_type()));
    STD_TORCH_CHECK(x.is_cpu(), name, " must be on the CPU like x, got another device");
  };
  check("codes" + n, codes, row_bytes(p), ScalarType::Byte);
  check("scales" + n, scales, groups(p), scale_bytes(p.format) == 1 ? ScalarType::Byte : ScalarType::Half);
  STD_TORCH_CHECK(zeros.has_value() == has_zeros(p.format), "zeros", n, " must be ",
                  has_zeros(p.format) ? "a tensor" : "None", " for ", format, ", got ", zeros ? "a tensor" : "None");
  if (zeros) check("zeros" + n, *zeros, groups(p), ScalarType::Byte);
  Packed out{torch::stable::contiguous(codes), torch::stable::contiguous(scales), {}, {}};
  if (zeros) out.zeros = torch::stable::contiguous(*zeros);
  out.matrix = {p, static_cast<const uint8_t*>(out.codes.const_data_ptr()), out.scales.const_data_ptr(),
                zeros ? static_cast<const uint8_t*>(out.zeros->const_data_ptr()) : nullptr};
  return out;
}

// The arguments that forward and backward share, checked; holds the tensors that the pointers belong to.
struct Call {
  Tensor x, ids, weights;
  Packed w1, w2;
  std::optional<Tensor> b1, b2;
  RoutedRows tokens;
  QuantizedExperts experts;
};

Call check(const Tensor& x, const Tensor& ids, const Tensor& weights, const Tensor& codes1, const Tensor& scales1,
           const std::optional<Tensor>& zeros1, const Tensor& codes2, const Tensor& scales2,
           const std::optional<Tensor>& zeros2, const std::optional<Tensor>& b1, const std::optional<Tensor>& b2,
           const std::string& format1, int64_t group1, const std::string& format2, int64_t group2,
           const std::string& activation, double alpha, double limit, const std::string& scale_on) {
  check_routed(x, ids, weights);
  const Activation act = activation_of(activation, alpha, limit);
  const bool gated = is_gated(act.act);
  const int64_t T = x.size(0), H = x.size(1), k = ids.size(1);
  Packed w1 = packed_of("1", codes1, scales1, zeros1, format1, group1, H);
  const int64_t E = codes1.size(0), width = w1.matrix.packing.rows, I = gated ? width / 2 : width;
  STD_TORCH_CHECK(!gated || width % 2 == 0, "codes1 must have an even 2I for the gated activation ", activation,
                  ", got ", shape(codes1));
  Packed w2 = packed_of("2", codes2, scales2, zeros2, format2, group2, I);
  STD_TORCH_CHECK(codes2.size(0) == E && codes2.size(1) == H, "codes2 must have shape [E=", E, ", H=", H,
                  ", bytes], got ", shape(codes2));
  if (b1) check_expert_bias("b1", *b1, x, E, width, gated ? "2I" : "I");
  if (b2) check_expert_bias("b2", *b2, x, E, H, "H");

  Call call{dense_rows(x), expert_ids(ids, E), scale_values(weights, x), w1, w2, {}, {}, {}, {}};
  if (b1) call.b1 = dense_rows(*b1);
  if (b2) call.b2 = dense_rows(*b2);
  call.tokens = {T, k, rows_of(call.x), static_cast<const int32_t*>(call.ids.const_data_ptr()),
                 call.weights.const_data_ptr()};
  const Halves halves{I, false, false};
  ExpertWeights floats{E,
                       H,
                       I,
                       {},
                       {},
                       {},
                       halves.vector(call.b1, false),
                       gated ? halves.vector(call.b1, true) : ExpertVector{},
                       1,
                       expert_vector(call.b2),
                       act,
                       scale_on_of(scale_on)};
  call.experts = {call.w1.matrix, call.w2.matrix, floats};
  return call;
}

}  // namespace

Tensor fused_experts_quantized_cpu(const Tensor& x, const Tensor& ids, const Tensor& weights, const Tensor& codes1,
                                   const Tensor& scales1, const std::optional<Tensor>& zeros1, const Tensor& codes2,
                                   const Tensor& scales2, const std::optional<Tensor>& zeros2,
                                   const std::optional<Tensor>& b1, const std::optional<Tensor>& b2,
                                   std::string format1, int64_t group1, std::string format2, int64_t group2,
                                   std::string activation, double alpha, double limit, std::string precision,
                                   std::string scale_on) {
  const Call call = check(x, ids, weights, codes1, scales1, zeros1, codes2, scales2, zeros2, b1, b2, format1, group1,
                          format2, group2, activation, alpha, limit, scale_on);
  const bool is_double = x.scalar_type() == ScalarType::Double;
  Precision used = precision_of(precision, call.w1.matrix.packing, call.w2.matrix.packing);
  if (is_double && precision == "auto") used = Precision::full;
  if (used != Precision::full) {
    STD_TORCH_CHECK(!is_double, "x must have dtype Float, BFloat16 or Half for int8 activations, got Double");
    const int64_t longest = std::max(call.experts.floats.H, call.experts.floats.I);
    STD_TORCH_CHECK(longest <= kMaxInt8Columns, "H and I must be at most ", kMaxInt8Columns,
                    " for int8 activations, got ", longest);
  }
  Tensor y = torch::stable::new_empty(x, {call.tokens.T, call.experts.floats.H});
  cpu::fused_experts_quantized(call.tokens, call.experts, used, torch::stable::get_num_threads(), y.mutable_data_ptr());
  return y;
}

// needs: bit 0 dx, bit 1 dweights; what is not needed comes back empty.
std::tuple<Tensor, Tensor> fused_experts_quantized_backward_cpu(
    const Tensor& dy, const Tensor& x, const Tensor& ids, const Tensor& weights, const Tensor& codes1,
    const Tensor& scales1, const std::optional<Tensor>& zeros1, const Tensor& codes2, const Tensor& scales2,
    const std::optional<Tensor>& zeros2, const std::optional<Tensor>& b1, const std::optional<Tensor>& b2,
    std::string format1, int64_t group1, std::string format2, int64_t group2, std::string activation, double alpha,
    double limit, std::string scale_on, int64_t needs) {
  const Call call = check(x, ids, weights, codes1, scales1, zeros1, codes2, scales2, zeros2, b1, b2, format1, group1,
                          format2, group2, activation, alpha, limit, scale_on);
  CHECK_CPU(dy);
  CHECK_SAME_DTYPE(dy, x);
  const int64_t T = call.tokens.T, H = call.experts.floats.H;
  STD_TORCH_CHECK(has_shape(dy, {T, H}), "dy must have shape [T=", T, ", H=", H, "], got ", shape(dy));
  const bool wants_x = needs & 1, wants_weights = needs & 2;
  Tensor dx = wants_x ? torch::stable::new_empty(x, {T, H}) : torch::stable::new_empty(x, {0});
  Tensor dweights = torch::stable::new_empty(call.weights, {wants_weights ? T : 0, call.tokens.k});
  const Tensor rows = dense_rows(dy);
  cpu::fused_experts_quantized_backward(rows_of(rows), call.tokens, call.experts, torch::stable::get_num_threads(),
                                        wants_x ? dx.mutable_data_ptr() : nullptr,
                                        wants_weights ? dweights.mutable_data_ptr() : nullptr);
  if (weights.scalar_type() != dweights.scalar_type()) dweights = torch::stable::to(dweights, weights.scalar_type());
  return {dx, dweights};
}

STABLE_TORCH_LIBRARY_IMPL(moert, CPU, m) {
  m.impl("fused_experts_quantized", TORCH_BOX(&fused_experts_quantized_cpu));
  m.impl("fused_experts_quantized_backward", TORCH_BOX(&fused_experts_quantized_backward_cpu));
}

}  // namespace moert
