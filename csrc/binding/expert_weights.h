// The weights of feed-forward experts at the boundary: checked, and as the kernels take them.
#pragma once

#include <utility>

#include "binding/experts.h"

namespace moert {

inline Activation activation_of(const std::string& name, double alpha, double limit) {
  static constexpr std::pair<const char*, Act> kActivations[] = {
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
  std::string known;
  for (const auto& [known_name, act] : kActivations) {
    if (name == known_name) return {act, alpha, limit};
    known += (known.empty() ? "" : ", ") + std::string(known_name);
  }
  MOERT_CHECK(false, "activation must be one of ", known, ", got ", name);
}

// How w1 holds its gate and up halves: one after the other, or in turns.
struct Halves {
  int64_t I;
  bool transposed, alternate;

  // The gate or up half of w1 [E, 2I, H] (or transposed).
  ExpertMatrix matrix(const Tensor& w1, bool up) const {
    ExpertMatrix half = expert_matrix(w1, transposed);
    const int64_t step = half.row_stride;
    if (up) half.data = static_cast<const char*>(half.data) + (alternate ? step : I * step) * size_of(half.dtype);
    if (alternate) half.row_stride = 2 * step;
    return half;
  }

  ExpertVector vector(const std::optional<Tensor>& b1, bool up) const {
    ExpertVector half = expert_vector(b1);
    if (half.data && up) half.data = static_cast<const char*>(half.data) + (alternate ? 1 : I) * size_of(half.dtype);
    return half;
  }
};

// Checked experts; holds the tensors that the pointers of `weights` belong to.
struct Experts {
  std::optional<Tensor> b1, b2;
  int64_t width;  // 2I where the activation is gated, else I
  bool gated;
  Halves halves;
  ExpertWeights weights;
};

inline void check_expert_bias(const char* name, const Tensor& bias, const Tensor& x, int64_t E, int64_t N,
                              const char* letter) {
  MOERT_CHECK(has_shape(bias, {E, N}), name, " must have shape [E=", E, ", ", letter, "=", N, "], got ", shape(bias));
  MOERT_CHECK(bias.scalar_type() == x.scalar_type(), name, " must have the dtype of x, ",
              torch::headeronly::toString(x.scalar_type()), ", got ", torch::headeronly::toString(bias.scalar_type()));
  MOERT_CHECK(is_beside(bias, x), name, " must be on " MOERT_DEVICE_NAME " like x, got another device");
}

// Whether the weights lie in panels, as moert.prepack_ leaves them; then both do.
inline bool in_panels(const Tensor& w1, const Tensor& w2) { return w1.dim() == 5 && w2.dim() == 5; }

#if defined(MOERT_CUDA)

inline void check_expert_panels(const Tensor&, const Tensor& w1, const Tensor&) {
  MOERT_CHECK(false, "w1 must not lie in panels on a GPU, got prepacked weights (unprepack_) of shape ", shape(w1));
}

#else

inline void check_panels(const char* name, const Tensor& w, const char* layout) {
  const cpu::Panel panel = cpu::panel_of(dtype(w));
  MOERT_CHECK(w.size(3) == panel.columns && w.size(4) == panel.depth && w.is_contiguous(), name,
              " in panels must be contiguous and have shape ", layout, ", columns=", panel.columns,
              ", depth=", panel.depth, "], got ", shape(w));
}

inline void check_expert_panels(const Tensor& x, const Tensor& w1, const Tensor& w2) {
  CHECK_SAME_DTYPE(w1, x);
  CHECK_SAME_DTYPE(w2, x);
  CHECK_SAME_DEVICE(w1, x);
  CHECK_SAME_DEVICE(w2, x);
  check_panels("w1", w1, "[E, 2I / columns, H / depth");
  check_panels("w2", w2, "[E, H / columns, I / depth");
}

#endif

// Rows and columns of the matrix of each expert.
inline std::pair<int64_t, int64_t> matrix_sizes(const Tensor& w, bool transposed) {
  if (w.dim() == 5) return {w.size(1) * w.size(3), w.size(2) * w.size(4)};
  return {w.size(transposed ? 2 : 1), w.size(transposed ? 1 : 2)};
}

// Rows [first, first + rows) of each expert's matrix in panels.
inline ExpertMatrix panel_matrix(const Tensor& w, int64_t first) {
  const auto [rows, columns] = matrix_sizes(w, false);
  const char* data = static_cast<const char*>(w.const_data_ptr()) + first * columns * size_of(dtype(w));
  return {data, dtype(w), rows * columns, columns, 1, true};
}

// w1 and w2 are matrices of experts of x's dtype; their sizes are checked by experts_of.
inline void check_expert_matrices(const Tensor& x, const Tensor& w1, const Tensor& w2) {
  CHECK_DIM(w1, 3, "[E, 2I, H]");
  CHECK_SAME_DEVICE(w1, x);
  CHECK_SAME_DTYPE(w1, x);
  CHECK_DIM(w2, 3, "[E, H, I]");
  CHECK_SAME_DEVICE(w2, x);
  CHECK_SAME_DTYPE(w2, x);
}

inline Experts experts_of(const Tensor& x, const Tensor& w1, const Tensor& w2, const std::optional<Tensor>& b1,
                          const std::optional<Tensor>& b2, const std::string& activation, double alpha, double limit,
                          bool transposed, bool interleaved) {
  const Activation act = activation_of(activation, alpha, limit);
  const bool gated = is_gated(act.act), alternate = gated && interleaved;
  const auto [width, columns] = matrix_sizes(w1, transposed);
  const int64_t H = x.size(1), E = w1.size(0);
  MOERT_CHECK(columns == H, "w1 must have shape ", transposed ? "[E, H=" : "[E, 2I, H=", H,
              transposed ? ", 2I], got " : "], got ", shape(w1));
  MOERT_CHECK(!gated || width % 2 == 0, "w1 must have an even 2I for the gated activation ", activation, ", got ",
              shape(w1));
  const int64_t I = gated ? width / 2 : width;
  MOERT_CHECK(w2.size(0) == E && matrix_sizes(w2, transposed) == std::pair(H, I), "w2 must have shape [E=", E, ", ",
              transposed ? "I=" : "H=", transposed ? I : H, ", ", transposed ? "H=" : "I=", transposed ? H : I,
              "], got ", shape(w2));
  if (b1) check_expert_bias("b1", *b1, x, E, width, gated ? "2I" : "I");
  if (b2) check_expert_bias("b2", *b2, x, E, H, "H");

  Experts experts{{}, {}, width, gated, {I, transposed, alternate}, {}};
  if (b1) experts.b1 = dense_rows(*b1);
  if (b2) experts.b2 = dense_rows(*b2);
  const Halves& halves = experts.halves;
  const bool panels = in_panels(w1, w2);
  MOERT_CHECK(!panels || !gated || I % w1.size(3) == 0, "w1 in panels must have its gate and up rows in panels of ",
              "their own, I a multiple of ", w1.dim() == 5 ? w1.size(3) : 0, ", got I=", I);
  const auto half = [&](bool up) { return panels ? panel_matrix(w1, up ? I : 0) : halves.matrix(w1, up); };
  experts.weights = {E,
                     H,
                     I,
                     half(false),
                     gated ? half(true) : ExpertMatrix{},
                     panels ? panel_matrix(w2, 0) : expert_matrix(w2, transposed),
                     halves.vector(experts.b1, false),
                     gated ? halves.vector(experts.b1, true) : ExpertVector{},
                     alternate ? 2 : 1,
                     expert_vector(experts.b2),
                     act};
  return experts;
}

}  // namespace moert
