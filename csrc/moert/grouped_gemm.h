// Grouped GEMM: one product per expert over rows in expert order.
#pragma once

#include <cstdint>
#include <limits>

#include "moert/dtype.h"

namespace moert {

// Rows of a matrix; with `index`, row r is the stored row index[r].
struct Rows {
  const void* data;
  DType dtype;
  int64_t stride;  // elements from one stored row to the next; the elements of a row lie side by side
  const int32_t* index = nullptr;
  int64_t count = std::numeric_limits<int64_t>::max();  // of stored rows; a GPU takes a row outside for zeros
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

struct GroupedGemm {
  int64_t S, E, N, K;
  const int32_t* offsets;       // [E+1]
  Rows x;                       // [S, K]
  ExpertMatrix w;               // [E, N, K]
  ExpertVector bias;            // [E, N]
  const void* scale = nullptr;  // [S], float32 (float64 where x is)
  ScaleOn scale_on = ScaleOn::output;
  bool batch_invariant = false;  // the bits of a row of y do not depend on the other rows
  bool tf32 = false;             // a GPU may round float32 factors to tf32
  void* workspace = nullptr;     // of cuda::grouped_gemm_workspace bytes, or null
};

struct GroupedGemmWgrad {
  int64_t S, E, N, K;
  const int32_t* offsets;  // [E+1]
  Rows dy;                 // [S, N]
  Rows x;                  // [S, K]
  bool tf32 = false;       // a GPU may round float32 factors to tf32
  // The sums are added to what dw holds, and nothing is written where an expert has no slots.
  bool accumulate = false;
};

namespace cpu {

// y [S, N], rows y_stride apart = x[s] . w[expert of s]^T, scaled before or after the bias is added; zero from
// offsets[E] on.  Sums are float32 (float64 where x is).
void grouped_gemm(const GroupedGemm& product, int64_t threads, void* y, int64_t y_stride);

// dw[e] = sum over the slots s of e of dy[s]^T x[s]; zero for an expert without slots.  dw is an ExpertMatrix whose
// data is written.
void grouped_gemm_wgrad(const GroupedGemmWgrad& product, int64_t threads, const ExpertMatrix& dw);

}  // namespace cpu

// The same on the current device, ordered by `stream` (a cudaStream_t); every pointer is the device's, offsets
// included, and nothing waits for what they hold.  Any strides; 16-bit elements in rows of 16-byte pieces go through
// the tensor cores, as does float32 with tf32.
namespace cuda {

// Bytes, aligned to 256, with which the current device may take a faster kernel for E experts; 0 where it has none.
int64_t grouped_gemm_workspace(int64_t E);

void grouped_gemm(const GroupedGemm& product, void* stream, void* y, int64_t y_stride);

void grouped_gemm_wgrad(const GroupedGemmWgrad& product, void* stream, const ExpertMatrix& dw);

}  // namespace cuda
}  // namespace moert
