#include "moert/grouped_gemm.h"

#include <limits>

#include "binding/batch_invariant.h"
#include "binding/experts.h"

namespace moert {

namespace {

// offsets [E+1]: ascending from 0, at most S.  Only a CPU looks at the values; a GPU stays within S whatever they are.
void check_offsets(const Tensor& offsets, const Tensor& rows, int64_t S) {
  CHECK_DIM(offsets, 1, "[E+1]");
  CHECK_SAME_DEVICE(offsets, rows);
  CHECK_DTYPE(offsets, Int);
  MOERT_CHECK(offsets.numel() >= 2, "offsets must have shape [E+1] with E >= 1, got ", shape(offsets));
#if defined(MOERT_CUDA)
  MOERT_CHECK(S <= std::numeric_limits<int32_t>::max(), "x must have fewer than 2^31 slots on a GPU, got ", S);
#else
  const auto* p = static_cast<const int32_t*>(offsets.const_data_ptr());
  bool ascending = p[0] == 0;
  for (int64_t e = 1, step = offsets.stride(0); e < offsets.numel(); ++e) ascending &= p[e * step] >= p[(e - 1) * step];
  MOERT_CHECK(ascending, "offsets must ascend from 0, got other values");
  const int64_t last = p[(offsets.numel() - 1) * offsets.stride(0)];
  MOERT_CHECK(last <= S, "offsets must end at or below S=", S, ", got ", last);
#endif
}

// tokens [S]: a row of x for every slot in use; a GPU takes zeros where it is none.
Tensor check_tokens(const Tensor& tokens, const Tensor& x, [[maybe_unused]] const int32_t* offsets,
                    [[maybe_unused]] int64_t E) {
  CHECK_DIM(tokens, 1, "[S]");
  CHECK_SAME_DEVICE(tokens, x);
  CHECK_DTYPE(tokens, Int);
  const Tensor index = torch::stable::contiguous(tokens);
#if !defined(MOERT_CUDA)
  const auto* p = static_cast<const int32_t*>(index.const_data_ptr());
  for (int64_t s = 0, T = x.size(0); s < offsets[E]; ++s)
    MOERT_CHECK(p[s] >= 0 && p[s] < T, "tokens must be in [0, T=", T, ") for every slot in use, got ", p[s]);
#endif
  return index;
}

// bias [E, N] as the kernels take it.
Tensor check_bias(const Tensor& bias, const Tensor& x, int64_t E, int64_t N) {
  MOERT_CHECK(has_shape(bias, {E, N}), "bias must have shape [E=", E, ", N=", N, "], got ", shape(bias));
  CHECK_SAME_DEVICE(bias, x);
  CHECK_SAME_DTYPE(bias, x);
  return dense_rows(bias);
}

Tensor check_scale(const Tensor& scale, const Tensor& x, int64_t S) {
  MOERT_CHECK(has_shape(scale, {S}), "scale must have shape [S=", S, "], got ", shape(scale));
  CHECK_SAME_DEVICE(scale, x);
  CHECK_SCALE_DTYPE(scale, x);
  return scale_values(scale, x);
}

}  // namespace

Tensor grouped_gemm(const Tensor& x, const Tensor& w, const Tensor& offsets, const std::optional<Tensor>& bias,
                    const std::optional<Tensor>& tokens, const std::optional<Tensor>& scale, std::string scale_on,
                    bool transposed, bool tf32) {
  CHECK_DIM(x, 2, "[S, K]");
  CHECK_FLOAT(x);
  CHECK_DEVICE(x);
  CHECK_DIM(w, 3, "[E, N, K]");
  CHECK_SAME_DEVICE(w, x);
  CHECK_SAME_DTYPE(w, x);
  const int64_t S = tokens ? tokens->numel() : x.size(0), K = x.size(1), E = w.size(0);
  const int64_t N = w.size(transposed ? 2 : 1);
  MOERT_CHECK(w.size(transposed ? 1 : 2) == K, "w must have shape ", transposed ? "[E, K=" : "[E, N, K=", K,
              transposed ? ", N], got " : "], got ", shape(w));
  check_offsets(offsets, x, S);
  MOERT_CHECK(offsets.numel() == E + 1, "offsets must have shape [E+1=", E + 1, "], got ", shape(offsets));
  const Tensor ends = torch::stable::contiguous(offsets);
  const auto* p = static_cast<const int32_t*>(ends.const_data_ptr());
  std::optional<Tensor> index, factors, biases;
  if (tokens) index = check_tokens(*tokens, x, p, E);
  if (bias) biases = check_bias(*bias, x, E, N);
  if (scale) factors = check_scale(*scale, x, S);
  const ScaleOn on = scale_on_of(scale_on);

  const Tensor rows = dense_rows(x);
  Tensor y = torch::stable::new_empty(x, {S, N});
  GroupedGemm product{S,
                      E,
                      N,
                      K,
                      p,
                      rows_of(rows, index ? static_cast<const int32_t*>(index->const_data_ptr()) : nullptr),
                      expert_matrix(w, transposed),
                      expert_vector(biases),
                      factors ? factors->const_data_ptr() : nullptr,
                      on,
                      batch_invariant,
                      tf32};
  const Execution execution(x);
#if defined(MOERT_CUDA)
  Tensor workspace = bytes_beside(x, cuda::grouped_gemm_workspace(E));
  if (workspace.numel()) product.workspace = workspace.mutable_data_ptr();
#endif
  device::grouped_gemm(product, execution, y.mutable_data_ptr(), N);
  return y;
}

Tensor grouped_gemm_wgrad(const Tensor& dy, const Tensor& x, const Tensor& offsets, const std::optional<Tensor>& tokens,
                          bool transposed, bool tf32) {
  CHECK_DIM(dy, 2, "[S, N]");
  CHECK_FLOAT(dy);
  CHECK_DEVICE(dy);
  CHECK_DIM(x, 2, "[S, K]");
  CHECK_SAME_DEVICE(x, dy);
  CHECK_SAME_DTYPE(x, dy);
  const int64_t S = dy.size(0), N = dy.size(1), K = x.size(1), E = offsets.numel() - 1;
  check_offsets(offsets, dy, S);
  const Tensor ends = torch::stable::contiguous(offsets);
  const auto* p = static_cast<const int32_t*>(ends.const_data_ptr());
  std::optional<Tensor> index;
  if (tokens) {
    MOERT_CHECK(has_shape(*tokens, {S}), "tokens must have shape [S=", S, "], got ", shape(*tokens));
    index = check_tokens(*tokens, x, p, E);
  } else {
    MOERT_CHECK(x.size(0) == S, "x must have shape [S=", S, ", K], got ", shape(x));
  }
  const Tensor left = dense_rows(dy), right = dense_rows(x);
  Tensor dw = transposed ? torch::stable::new_empty(dy, {E, K, N}) : torch::stable::new_empty(dy, {E, N, K});
  const GroupedGemmWgrad product{S,
                                 E,
                                 N,
                                 K,
                                 p,
                                 rows_of(left),
                                 rows_of(right, index ? static_cast<const int32_t*>(index->const_data_ptr()) : nullptr),
                                 tf32};
  device::grouped_gemm_wgrad(product, Execution(x), expert_matrix(dw, transposed));
  return dw;
}

STABLE_TORCH_LIBRARY_IMPL(moert, MOERT_DISPATCH_KEY, m) {
  m.impl("grouped_gemm", TORCH_BOX(&grouped_gemm));
  m.impl("grouped_gemm_wgrad", TORCH_BOX(&grouped_gemm_wgrad));
}

}  // namespace moert
