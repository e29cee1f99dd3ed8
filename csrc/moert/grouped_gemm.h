// Grouped GEMM: one product per expert over rows in expert order.
#pragma once

#include <cstdint>

#include "moert/dtype.h"

namespace moert {

// Rows of a matrix; with `index`, row r is the stored row index[r].
struct Rows {
  const void* data;
  DType dtype;
  int64_t stride;  // elements from one stored row to the next; the elements of a row lie side by side
  const int32_t* index = nullptr;
};

// One matrix per expert, of any layout: element (e, r, c) is data[e * expert_stride + r * row_stride + c * col_stride].
struct ExpertMatrix {
  const void* data;
  DType dtype;
  int64_t expert_stride, row_stride, col_stride;
  bool panels = false;  // in the layout of cpu::panel_of; then row_stride is the number of columns
};

// One vector per expert; data may be null.
struct ExpertVector {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t expert_stride = 0;
};

enum class ScaleOn : int32_t { output, input };

namespace cpu {

struct GroupedGemm {
  int64_t S, E, N, K;
  const int32_t* offsets;       // [E+1]
  Rows x;                       // [S, K]
  ExpertMatrix w;               // [E, N, K]
  ExpertVector bias;            // [E, N]
  const void* scale = nullptr;  // [S], float32 (float64 where x is)
  ScaleOn scale_on = ScaleOn::output;
  bool batch_invariant = false;  // the bits of a row of y do not depend on the other rows
};

// y [S, N], rows y_stride apart = x[s] . w[expert of s]^T, scaled before or after the bias is added; zero from
// offsets[E] on.  Sums are float32 (float64 where x is).
void grouped_gemm(const GroupedGemm& product, int64_t threads, void* y, int64_t y_stride);

// dw[e] = sum over the slots s of e of dy[s]^T x[s]; zero for an expert without slots.
struct GroupedGemmWgrad {
  int64_t E, N, K;
  const int32_t* offsets;  // [E+1]
  Rows dy;                 // [S, N]
  Rows x;                  // [S, K]
};

// dw is an ExpertMatrix whose data is written.
void grouped_gemm_wgrad(const GroupedGemmWgrad& product, int64_t threads, const ExpertMatrix& dw);

}  // namespace cpu
}  // namespace moert
