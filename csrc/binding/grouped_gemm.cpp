#include "moert/grouped_gemm.h"

#include "binding/batch_invariant.h"
#include "binding/experts.h"

namespace moert {

namespace {

// offsets [E+1]: ascending from 0, at most S.
void check_offsets(const Tensor& offsets, int64_t S) {
  CHECK_DIM(offsets, 1, "[E+1]");
  CHECK_DEVICE(offsets);
  CHECK_DTYPE(offsets, Int);
  STD_TORCH_CHECK(offsets.numel() >= 2, "offsets must have shape [E+1] with E >= 1, got ", shape(offsets));
  const auto* p = static_cast<const int32_t*>(offsets.const_data_ptr());
  bool ascending = p[0] == 0;
  for (int64_t e = 1, step = offsets.stride(0); e < offsets.numel(); ++e) ascending &= p[e * step] >= p[(e - 1) * step];
  STD_TORCH_CHECK(ascending, "offsets must ascend from 0, got other values");
  const int64_t last = p[(offsets.numel() - 1) * offsets.stride(0)];
  STD_TORCH_CHECK(last <= S, "offsets must end at or below S=", S, ", got ", last);
}

// tokens [S]: a row of x for every slot in use.
void check_tokens(const Tensor& tokens, int64_t used, int64_t T) {
  CHECK_DIM(tokens, 1, "[S]");
  CHECK_DEVICE(tokens);
  CHECK_DTYPE(tokens, Int);
  const auto* p = static_cast<const int32_t*>(tokens.const_data_ptr());
  for (int64_t s = 0; s < used; ++s)
    STD_TORCH_CHECK(p[s] >= 0 && p[s] < T, "tokens must be in [0, T=", T, ") for every slot in use, got ", p[s]);
}

}  // namespace

Tensor grouped_gemm_cpu(const Tensor& x, const Tensor& w, const Tensor& offsets, const std::optional<Tensor>& bias,
                        const std::optional<Tensor>& tokens, const std::optional<Tensor>& scale, std::string scale_on,
                        bool transposed) {
  CHECK_DIM(x, 2, "[S, K]");
  CHECK_FLOAT(x);
  CHECK_DEVICE(x);
  CHECK_DIM(w, 3, "[E, N, K]");
  CHECK_DEVICE(w);
  CHECK_SAME_DTYPE(w, x);
  const int64_t S = tokens ? tokens->numel() : x.size(0), K = x.size(1), E = w.size(0);
  const int64_t N = w.size(transposed ? 2 : 1);
  STD_TORCH_CHECK(w.size(transposed ? 1 : 2) == K, "w must have shape ", transposed ? "[E, K=" : "[E, N, K=", K,
                  transposed ? ", N], got " : "], got ", shape(w));
  check_offsets(offsets, S);
  STD_TORCH_CHECK(offsets.numel() == E + 1, "offsets must have shape [E+1=", E + 1, "], got ", shape(offsets));
  const Tensor ends = torch::stable::contiguous(offsets);
  const auto* p = static_cast<const int32_t*>(ends.const_data_ptr());
  std::optional<Tensor> index, factors, biases;
  if (tokens) {
    index = torch::stable::contiguous(*tokens);
    check_tokens(*index, p[E], x.size(0));
  }
  if (bias) {
    STD_TORCH_CHECK(has_shape(*bias, {E, N}), "bias must have shape [E=", E, ", N=", N, "], got ", shape(*bias));
    CHECK_DEVICE(*bias);
    STD_TORCH_CHECK(bias->scalar_type() == x.scalar_type(), "bias must have the dtype of x, ",
                    torch::headeronly::toString(x.scalar_type()), ", got ",
                    torch::headeronly::toString(bias->scalar_type()));
    biases = dense_rows(*bias);
  }
  if (scale) {
    STD_TORCH_CHECK(has_shape(*scale, {S}), "scale must have shape [S=", S, "], got ", shape(*scale));
    CHECK_DEVICE(*scale);
    CHECK_SCALE_DTYPE(*scale, x);
    factors = scale_values(*scale, x);
  }
  const ScaleOn on = scale_on_of(scale_on);

  const Tensor rows = dense_rows(x);
  Tensor y = torch::stable::new_empty(x, {S, N});
  const GroupedGemm product{S,
                            E,
                            N,
                            K,
                            p,
                            rows_of(rows, index ? static_cast<const int32_t*>(index->const_data_ptr()) : nullptr),
                            expert_matrix(w, transposed),
                            expert_vector(biases),
                            factors ? factors->const_data_ptr() : nullptr,
                            on,
                            batch_invariant};
  cpu::grouped_gemm(product, torch::stable::get_num_threads(), y.mutable_data_ptr(), N);
  return y;
}

Tensor grouped_gemm_wgrad_cpu(const Tensor& dy, const Tensor& x, const Tensor& offsets,
                              const std::optional<Tensor>& tokens, bool transposed) {
  CHECK_DIM(dy, 2, "[S, N]");
  CHECK_FLOAT(dy);
  CHECK_DEVICE(dy);
  CHECK_DIM(x, 2, "[S, K]");
  CHECK_DEVICE(x);
  CHECK_SAME_DTYPE(x, dy);
  const int64_t S = dy.size(0), N = dy.size(1), K = x.size(1), E = offsets.numel() - 1;
  check_offsets(offsets, S);
  const Tensor ends = torch::stable::contiguous(offsets);
  const auto* p = static_cast<const int32_t*>(ends.const_data_ptr());
  std::optional<Tensor> index;
  if (tokens) {
    STD_TORCH_CHECK(has_shape(*tokens, {S}), "tokens must have shape [S=", S, "], got ", shape(*tokens));
    index = torch::stable::contiguous(*tokens);
    check_tokens(*index, p[E], x.size(0));
  } else {
    STD_TORCH_CHECK(x.size(0) == S, "x must have shape [S=", S, ", K], got ", shape(x));
  }
  const Tensor left = dense_rows(dy), right = dense_rows(x);
  Tensor dw = transposed ? torch::stable::new_empty(dy, {E, K, N}) : torch::stable::new_empty(dy, {E, N, K});
  const GroupedGemmWgrad product{
      S,
      E,
      N,
      K,
      p,
      rows_of(left),
      rows_of(right, index ? static_cast<const int32_t*>(index->const_data_ptr()) : nullptr)};
  cpu::grouped_gemm_wgrad(product, torch::stable::get_num_threads(), expert_matrix(dw, transposed));
  return dw;
}

STABLE_TORCH_LIBRARY_IMPL(moert, CPU, m) {
  m.impl("grouped_gemm", TORCH_BOX(&grouped_gemm_cpu));
  m.impl("grouped_gemm_wgrad", TORCH_BOX(&grouped_gemm_wgrad_cpu));
}

}  // namespace moert
