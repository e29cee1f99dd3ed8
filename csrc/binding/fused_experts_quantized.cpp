#include "moert/fused_experts_quantized.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "binding/batch_invariant.h"
#include "binding/expert_weights.h"
#include "binding/ids.h"
#include "moert/bit_nested.h"
#include "moert/fp8.h"

namespace moert {

namespace {

Format format_of(const char* name, const std::string& format) {
  std::string known;
  for (int i = 0; i < kFormats; ++i) {
    if (format == cpu::name(Format(i))) return Format(i);
    known += (i ? ", " : "") + std::string(cpu::name(Format(i)));
  }
  MOERT_CHECK(false, name, " must be one of ", known, ", got ", format);
}

#if defined(MOERT_CUDA)
constexpr bool kOnCpu = false;
#else
constexpr bool kOnCpu = true;
#endif

Precision auto_precision(const QuantizedExperts& w, const RoutedRows& tokens) {
#if defined(MOERT_CUDA)
  return Precision::full;
#else
  if (tokens.x.dtype == DType::f64) return Precision::full;
  const Precision by_format = default_precision(w.w1.packing, w.w2.packing);
  const int64_t rows = std::count_if(tokens.ids, tokens.ids + tokens.T * tokens.k, [](int32_t id) { return id >= 0; });
  const bool ternary = is_ternary(w.w1.packing.format) && is_ternary(w.w2.packing.format);
  return cpu::auto_precision(by_format, ternary, rows, w.floats.E, tokens.batch_invariant);
#endif
}

Precision precision_of(const std::string& name, const Packing& w1, const Packing& w2) {
  std::string known = "auto";
  for (const Precision p : kPrecisions) {
    if (is_on_cpu_alone(p) && !kOnCpu) continue;
    known += ", " + std::string(moert::name(p));
    if (name != moert::name(p)) continue;
    for (const Format format : {w1.format, w2.format}) {
      std::string has = "auto";
      for (const Precision other : kPrecisions)
        if (takes(format, other) && (kOnCpu || !is_on_cpu_alone(other))) has += ", " + std::string(moert::name(other));
      MOERT_CHECK(takes(format, p), "precision must be one of ", has, " for ", cpu::name(format), ", got ", name);
    }
    return p;
  }
  MOERT_CHECK(false, "precision must be one of ", known, ", got ", name);
}

struct Size {
  const char* name;
  int64_t size;
};

// One part of a packed matrix as it must be.
void check_part(const std::string& name, const Tensor& x, const std::vector<Size>& sizes, ScalarType type,
                const std::string& of, const Tensor& beside) {
  bool fits = x.dim() == int64_t(sizes.size());
  std::string wanted;
  for (size_t d = 0; d < sizes.size(); ++d) {
    fits = fits && x.size(int64_t(d)) == sizes[d].size;
    wanted += (d ? ", " : "") + std::string(sizes[d].name) + "=" + std::to_string(sizes[d].size);
  }
  MOERT_CHECK(fits, name, " must have shape [", wanted, "] for ", of, ", got ", shape(x));
  MOERT_CHECK(x.scalar_type() == type, name, " must have dtype ", torch::headeronly::toString(type), " for ", of,
              ", got ", torch::headeronly::toString(x.scalar_type()));
  MOERT_CHECK(is_beside(x, beside), name, " must be on " MOERT_DEVICE_NAME " like x, got another device");
}

// The arrays of one packed matrix, checked.
struct Packed {
  Tensor codes, scales;
  std::optional<Tensor> zeros;
  std::vector<int64_t> starts;  // of sub1
  PackedMatrix matrix;
  int64_t E;
};

struct PackedArguments {
  const char* n;  // "1" or "2": of the matrix
  const Tensor &codes, &scales;
  const std::optional<Tensor>& zeros;
  std::string format;
  int64_t group, columns;
  const Tensor& x;

  std::string name(const char* part) const { return part + std::string(n); }

  void check_dim(int64_t dim, const char* layout) const {
    MOERT_CHECK(codes.dim() == dim, name("codes"), " must be ", layout, ", got shape ", shape(codes));
  }
  void check_zeros(bool wanted) const {
    MOERT_CHECK(zeros.has_value() == wanted, name("zeros"), " must be ", wanted ? "a tensor" : "None", " for ", format,
                ", got ", zeros ? "a tensor" : "None");
  }
  void check_no_group() const { MOERT_CHECK(group == 0, "group", n, " must be 0 for ", format, ", got ", group); }
  void check_part(const char* part, const Tensor& given, const std::vector<Size>& sizes, ScalarType type) const {
    moert::check_part(name(part), given, sizes, type, std::to_string(columns) + " columns of " + format, x);
  }
  Packed taken(const Packing& p, int64_t E) const {
    return {
        torch::stable::contiguous(codes), torch::stable::contiguous(scales), {}, {}, {p, nullptr, nullptr, nullptr}, E};
  }
};

// Scales of groups within a row.
Packed packed_rows(const PackedArguments& a, Format format) {
  a.check_dim(3, "[E, rows, bytes]");
  const Packing p{format, a.codes.size(1), a.columns, a.group};
  cpu::check_packing(p);
  const Size E{"E", a.codes.size(0)}, rows{"rows", p.rows}, per_row{"groups", groups(p)};
  a.check_part("codes", a.codes, {E, rows, {"bytes", row_bytes(p)}}, ScalarType::Byte);
  const ScalarType type = scale_bytes(format) == 1 ? ScalarType::Byte : ScalarType::Half;
  a.check_part("scales", a.scales, {E, rows, per_row}, type);
  a.check_zeros(has_zeros(format));
  if (a.zeros) a.check_part("zeros", *a.zeros, {E, rows, per_row}, ScalarType::Byte);
  return a.taken(p, E.size);
}

Packed packed_fp8(const PackedArguments& a) {
  a.check_dim(3, "[E, rows, bytes]");
  a.check_no_group();
  a.check_zeros(false);
  const Packing p{Format::fp8, a.codes.size(1), a.columns, kFp8Block};
  const Size E{"E", a.codes.size(0)};
  a.check_part("codes", a.codes, {E, {"rows", p.rows}, {"bytes", row_bytes(p)}}, ScalarType::Byte);
  const Size bands{"blocks of rows", fp8_blocks(p.rows)}, blocks{"blocks of columns", groups(p)};
  a.check_part("scales", a.scales, {E, bands, blocks}, ScalarType::Float);
  return a.taken(p, E.size);
}

// The tensor, or a copy where its matrices are not contiguous each: a prefix of the planes is taken as it lies.
Tensor dense_matrices(const Tensor& x) {
  int64_t dense = 1;
  for (int64_t d = x.dim() - 1; d > 0; dense *= x.size(d--))
    if (x.size(d) > 1 && x.stride(d) != dense) return torch::stable::contiguous(x);
  return x;
}

Packed packed_bit_nested(const PackedArguments& a) {
  a.check_dim(4, "[E, planes, rows, bytes]");
  a.check_zeros(false);
  const Size E{"E", a.codes.size(0)}, planes{"planes", a.codes.size(1)}, rows{"rows", a.codes.size(2)};
  cpu::check_packing(BitNestedPacking{E.size, rows.size, a.columns, a.group, planes.size});
  const Packing p{Format::bit_nested, rows.size, a.columns, a.group, planes.size};
  a.check_part("codes", a.codes, {E, planes, rows, {"bytes", row_bytes(p)}}, ScalarType::Byte);
  a.check_part("scales", a.scales, {E, rows, {"groups", groups(p)}}, ScalarType::Half);
  Packed out = a.taken(p, E.size);
  out.codes = dense_matrices(a.codes);
  out.matrix.codes_stride = out.codes.stride(0);
  return out;
}

// codes of all experts, scales minmax [E, rows, 2], zeros row_ptr [E, rows + 1].
Packed packed_sub1(const PackedArguments& a) {
  a.check_dim(1, "[codewords]");
  a.check_no_group();
  a.check_zeros(true);
  MOERT_CHECK(a.scales.dim() == 3, a.name("scales"), " must be [E, rows, 2], got shape ", shape(a.scales));
  const Size E{"E", a.scales.size(0)}, rows{"rows", a.scales.size(1)};
  a.check_part("codes", a.codes, {{"codewords", a.codes.size(0)}}, ScalarType::UInt16);
  a.check_part("scales", a.scales, {E, rows, {"limits", 2}}, ScalarType::BFloat16);
  a.check_part("zeros", *a.zeros, {E, {"rows + 1", rows.size + 1}}, ScalarType::Int);
  Packed out = a.taken({Format::sub1, rows.size, a.columns, 0}, E.size);
  out.zeros = torch::stable::contiguous(*a.zeros);
  out.matrix.size = a.codes.size(0);
#if !defined(MOERT_CUDA)  // there the kernel looks: these numbers are the device's
  const int32_t* ends = static_cast<const int32_t*>(out.zeros->const_data_ptr());
  int64_t end = 0;
  out.starts.push_back(0);
  for (int64_t e = 1; e <= E.size; ++e) {
    const int32_t size = ends[e * (rows.size + 1) - 1];
    MOERT_CHECK(size >= 0, a.name("zeros"), " must rise from 0, got ", size, " codewords in expert ", e - 1);
    out.starts.push_back(end += size);
  }
  MOERT_CHECK(end == a.codes.size(0), a.name("codes"), " must hold the ", end, " codewords of ", a.name("zeros"),
              ", got ", a.codes.size(0));
  out.matrix.starts = out.starts.data();  // a moved vector keeps its memory
#endif
  return out;
}

Packed packed_of(const PackedArguments& a) {
  const Format format = format_of(a.name("format").c_str(), a.format);
  Packed out = format == Format::fp8          ? packed_fp8(a)
               : format == Format::bit_nested ? packed_bit_nested(a)
               : format == Format::sub1       ? packed_sub1(a)
                                              : packed_rows(a, format);
  if (a.zeros && !out.zeros) out.zeros = torch::stable::contiguous(*a.zeros);
  out.matrix.codes = static_cast<const uint8_t*>(out.codes.const_data_ptr());
  out.matrix.scales = out.scales.const_data_ptr();
  out.matrix.zeros = out.zeros ? static_cast<const uint8_t*>(out.zeros->const_data_ptr()) : nullptr;
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
  Packed w1 = packed_of({"1", codes1, scales1, zeros1, format1, group1, H, x});
  const int64_t E = w1.E, width = w1.matrix.packing.rows, I = gated ? width / 2 : width;
  MOERT_CHECK(!gated || width % 2 == 0, "codes1 must have an even 2I for the gated activation ", activation,
              ", got 2I = ", width);
  Packed w2 = packed_of({"2", codes2, scales2, zeros2, format2, group2, I, x});
  MOERT_CHECK(w2.E == E && w2.matrix.packing.rows == H, "codes2 must be of E=", E, " experts and H=", H, " rows, got ",
              w2.E, " and ", w2.matrix.packing.rows);
  if (b1) check_expert_bias("b1", *b1, x, E, width, gated ? "2I" : "I");
  if (b2) check_expert_bias("b2", *b2, x, E, H, "H");

  Call call{dense_rows(x), expert_ids(ids, E), scale_values(weights, x), std::move(w1), std::move(w2), {}, {}, {}, {}};
  if (b1) call.b1 = dense_rows(*b1);
  if (b2) call.b2 = dense_rows(*b2);
  call.tokens = {T,
                 k,
                 rows_of(call.x),
                 static_cast<const int32_t*>(call.ids.const_data_ptr()),
                 call.weights.const_data_ptr(),
                 batch_invariant};
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

Tensor fused_experts_quantized(const Tensor& x, const Tensor& ids, const Tensor& weights, const Tensor& codes1,
                               const Tensor& scales1, const std::optional<Tensor>& zeros1, const Tensor& codes2,
                               const Tensor& scales2, const std::optional<Tensor>& zeros2,
                               const std::optional<Tensor>& b1, const std::optional<Tensor>& b2, std::string format1,
                               int64_t group1, std::string format2, int64_t group2, std::string activation,
                               double alpha, double limit, std::string precision, std::string scale_on) {
  const Call call = check(x, ids, weights, codes1, scales1, zeros1, codes2, scales2, zeros2, b1, b2, format1, group1,
                          format2, group2, activation, alpha, limit, scale_on);
  const int64_t T = call.tokens.T, H = call.experts.floats.H;
  const bool is_double = x.scalar_type() == ScalarType::Double;
  const Precision used = precision == "auto" ? auto_precision(call.experts, call.tokens)
                                             : precision_of(precision, call.w1.matrix.packing, call.w2.matrix.packing);
  if (used != Precision::full) {
    MOERT_CHECK(!is_double, "x must have dtype Float, BFloat16 or Half for ", name(used), " rows, got Double");
    const int64_t longest = std::max(H, call.experts.floats.I);
    MOERT_CHECK(!is_int8(used) || longest <= kMaxInt8Columns, "H and I must be at most ", kMaxInt8Columns, " for ",
                name(used), " rows, got ", longest);
  }
  Tensor y = torch::stable::new_empty(x, {T, H});
  const Execution execution(x);
#if defined(MOERT_CUDA)
  Tensor workspace = bytes_beside(x, cuda::fused_experts_quantized_workspace(call.tokens, call.experts, used));
  cuda::fused_experts_quantized(call.tokens, call.experts, used, workspace.mutable_data_ptr(), execution,
                                y.mutable_data_ptr());
#else
  cpu::fused_experts_quantized(call.tokens, call.experts, used, execution, y.mutable_data_ptr());
#endif
  return y;
}

// needs: bit 0 dx, bit 1 dweights; what is not needed comes back empty.
std::tuple<Tensor, Tensor> fused_experts_quantized_backward(
    const Tensor& dy, const Tensor& x, const Tensor& ids, const Tensor& weights, const Tensor& codes1,
    const Tensor& scales1, const std::optional<Tensor>& zeros1, const Tensor& codes2, const Tensor& scales2,
    const std::optional<Tensor>& zeros2, const std::optional<Tensor>& b1, const std::optional<Tensor>& b2,
    std::string format1, int64_t group1, std::string format2, int64_t group2, std::string activation, double alpha,
    double limit, std::string scale_on, int64_t needs) {
  const Call call = check(x, ids, weights, codes1, scales1, zeros1, codes2, scales2, zeros2, b1, b2, format1, group1,
                          format2, group2, activation, alpha, limit, scale_on);
  CHECK_SAME_DEVICE(dy, x);
  CHECK_SAME_DTYPE(dy, x);
  const int64_t T = call.tokens.T, H = call.experts.floats.H;
  MOERT_CHECK(has_shape(dy, {T, H}), "dy must have shape [T=", T, ", H=", H, "], got ", shape(dy));
  const bool wants_x = needs & 1, wants_weights = needs & 2;
  Tensor dx = wants_x ? torch::stable::new_empty(x, {T, H}) : torch::stable::new_empty(x, {0});
  Tensor dweights = torch::stable::new_empty(call.weights, {wants_weights ? T : 0, call.tokens.k});
  const Tensor rows = dense_rows(dy);
  void* const dx_data = wants_x ? dx.mutable_data_ptr() : nullptr;
  void* const dweights_data = wants_weights ? dweights.mutable_data_ptr() : nullptr;
  const Execution execution(x);
#if defined(MOERT_CUDA)
  ExpertGradients gradients;
  gradients.dx = dx_data, gradients.dweights = dweights_data;
  Tensor workspace =
      bytes_beside(x, cuda::fused_experts_quantized_backward_workspace(call.tokens, call.experts, gradients));
  cuda::fused_experts_quantized_backward(rows_of(rows), call.tokens, call.experts, workspace.mutable_data_ptr(),
                                         execution, gradients);
#else
  cpu::fused_experts_quantized_backward(rows_of(rows), call.tokens, call.experts, execution, dx_data, dweights_data);
#endif
  if (weights.scalar_type() != dweights.scalar_type()) dweights = torch::stable::to(dweights, weights.scalar_type());
  return {dx, dweights};
}

STABLE_TORCH_LIBRARY_IMPL(moert, MOERT_DISPATCH_KEY, m) {
  m.impl("fused_experts_quantized", TORCH_BOX(&fused_experts_quantized));
  m.impl("fused_experts_quantized_backward", TORCH_BOX(&fused_experts_quantized_backward));
}

}  // namespace moert
