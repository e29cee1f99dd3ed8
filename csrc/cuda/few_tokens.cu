#include "cuda/few_tokens.h"

#include "cuda/few_tokens.cuh"
#include "cuda/launch.h"

namespace moert::cuda {

namespace {

template <typename T>
StridedMatrix<T> strided(const ExpertMatrix& m) {
  return {static_cast<const T*>(m.data), m.expert_stride, m.row_stride, m.col_stride};
}

// All but the tokens and the output.
template <typename T>
FewTokens<T> call_of(const Rows& x, const int32_t* ids, int64_t tokens, int64_t k, const ExpertWeights& w,
                     void* workspace, void* y) {
  FewTokens<T> p{};
  p.x = static_cast<const T*>(x.data);
  p.x_stride = x.stride;
  p.ids = ids;
  p.tokens = tokens, p.k = k;
  p.y = static_cast<T*>(y);
  p.E = w.E, p.H = w.H, p.I = w.I;
  p.gate = strided<T>(w.gate);
  p.up = strided<T>(is_gated(w.activation.act) ? w.up : w.gate);
  p.down = strided<T>(w.down);
  p.gate_bias = static_cast<const T*>(w.gate_bias.data);
  p.up_bias = static_cast<const T*>(w.up_bias.data);
  p.down_bias = static_cast<const T*>(w.down_bias.data);
  p.bias1_expert = w.gate_bias.expert_stride;
  p.bias1_step = w.bias1_stride;
  p.down_bias_expert = w.down_bias.expert_stride;
  p.form = activation_form<Acc<T>>(w.activation);
  p.scale_input = w.scale_on == ScaleOn::input;
  p.act = static_cast<Acc<T>*>(workspace);
  return p;
}

// Whether rows of `length` elements, `stride` apart, can be read 16 bytes at a time.
template <typename T>
bool in_chunks(const StridedMatrix<T>& m, int64_t stride, int64_t length) {
  constexpr int64_t size = sizeof(T);
  return is_aligned(m.data, stride * size) && is_aligned(nullptr, m.expert * size) &&
         is_aligned(nullptr, length * size);
}

template <typename T>
Lie lie_of_first(const FewTokens<T>& p) {
  const bool rows = p.gate.column == 1 && p.up.column == 1 && in_chunks(p.gate, p.gate.row, p.H) &&
                    in_chunks(p.up, p.up.row, p.H) && is_aligned(p.x, p.x_stride * int64_t(sizeof(T)));
  if (rows) return Lie::rows;
  if (p.gate.row == 2 && p.up.row == 2 && p.up.data == p.gate.data + 1)
    return in_chunks(p.gate, p.gate.column, 2 * p.I) ? Lie::columns : Lie::any;
  const bool columns =
      p.gate.row == 1 && p.up.row == 1 && in_chunks(p.gate, p.gate.column, p.I) && in_chunks(p.up, p.up.column, p.I);
  return columns ? Lie::columns : Lie::any;
}

template <typename T>
Lie lie_of_second(const FewTokens<T>& p) {
  if (p.down.column == 1 && in_chunks(p.down, p.down.row, p.I)) return Lie::rows;
  return p.down.row == 1 && in_chunks(p.down, p.down.column, p.H) ? Lie::columns : Lie::any;
}

template <typename T, bool Gated>
void run_first(const FewTokens<T>& p, void* stream) {
  const int64_t choices = p.tokens * p.k, columns = kAcross * kChunk<T>;
  const Lie lie = lie_of_first(p);
  if (lie == Lie::columns && Gated && p.gate.row == 2)
    return launch(&few_first_columns<T, true, true>, {choices * ceil_div(2 * p.I, columns)}, kColumnThreads, stream, p);
  if (lie == Lie::columns)
    return launch(&few_first_columns<T, Gated, false>, {choices * ceil_div(p.I, columns)}, kColumnThreads, stream, p);
  launch(lie == Lie::rows ? &few_first_rows<T, Gated> : &few_first_any<T, Gated>, {ceil_div(choices * p.I, kFewWarps)},
         kFewThreads, stream, p);
}

template <typename T>
void run(const FewTokens<T>& p, void* stream) {
  (p.form.gated ? run_first<T, true> : run_first<T, false>)(p, stream);
  const Lie lie = lie_of_second(p);
  if (lie == Lie::columns)
    return launch(&few_second_columns<T>, {p.tokens * ceil_div(p.H, kAcross * kChunk<T>)}, kColumnThreads, stream, p);
  launch(lie == Lie::rows ? &few_second_rows<T> : &few_second_any<T>, {ceil_div(p.tokens * p.H, kFewWarps)},
         kFewThreads, stream, p);
}

}  // namespace

int64_t few_tokens_workspace(DType dtype, int64_t choices, int64_t I) {
  return choices * I * (dtype == DType::f64 ? 8 : 4);
}

void fused_experts_few(const RoutedRows& tokens, const ExpertWeights& experts, void* workspace, void* stream, void* y) {
  with_dtype(tokens.x.dtype, [&](auto type) {
    using T = decltype(type);
    FewTokens<T> p = call_of<T>(tokens.x, tokens.ids, tokens.T, tokens.k, experts, workspace, y);
    p.ids_stride = p.weights_stride = tokens.k;
    p.weights = static_cast<const Acc<T>*>(tokens.weights);
    p.onto = OntoOf<T>(tokens.onto);
    run(p, stream);
  });
}

int64_t union_experts_workspace(const UnionRows& tokens, const ExpertWeights& experts) {
  return few_tokens_workspace(tokens.x.dtype, tokens.T * tokens.n, experts.I);
}

void union_experts(const UnionRows& tokens, const ExpertWeights& experts, void* workspace, void* stream, void* y) {
  with_dtype(tokens.x.dtype, [&](auto type) {
    using T = decltype(type);
    FewTokens<T> p = call_of<T>(tokens.x, tokens.ids, tokens.T, tokens.n, experts, workspace, y);
    p.weights = static_cast<const Acc<T>*>(tokens.gains);
    p.weights_stride = experts.E;
    p.by_expert = true;
    run(p, stream);
  });
}

}  // namespace moert::cuda
