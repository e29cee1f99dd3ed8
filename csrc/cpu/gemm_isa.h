// What the GEMM drivers ask of an instruction set: products of tiles and what happens to a tile afterwards.
// A "value" is float, or double where the operands are float64.
#pragma once

#include <cstdint>

#include "moert/fused_experts.h"

namespace moert::cpu {

constexpr int64_t kTileRows = 256;     // M of a tile at most
constexpr int64_t kTileColumns = 256;  // N of a tile at most
constexpr int64_t kTileK = 256;        // K block

// Up to so many rows are multiplied as dot products, in longer K blocks: the lanes are summed once a block.
constexpr int64_t kDotRows = 96;
constexpr int64_t kDotK = 2048;

// Rows of the block of A, [M, K] or [K, M], lie this far apart, so that they fall on different cache sets.
constexpr int64_t kPitchMK = kTileK + 16, kPitchKM = kTileRows + 16;
constexpr int64_t kTileBlock = kTileK * kPitchKM;
static_assert(kTileRows * kPitchMK <= kTileBlock);

// Values that gemm() needs to work in: a block of A for dot products, or one of panels and a panel of B.
// For tile registers: the pairs of kTileRows rows of kPairK elements, 32 rows of weights, and a tile of sums.
constexpr int64_t kPairK = 2048;
constexpr int64_t kGemmScratch = (kTileRows + 32) * kPairK / 2 + 1024 + kTileRows * kTileColumns;
static_assert(kDotRows * (kDotK + 16) <= kGemmScratch && kTileBlock + 32 * kTileK <= kGemmScratch);

// Element (r, c) is data[row(r) * row_stride + c * col_stride]; row(r) = index ? index[r] : r.
struct TileMatrix {
  const void* data;
  DType dtype;
  int64_t row_stride, col_stride;
  const int32_t* index;
};

// A side of a product: rows by K, or K by rows if k_rows; or, of b alone, as panel_of says.
struct TileOperand {
  TileMatrix matrix;
  bool k_rows;
  bool panels = false;
};

// out[m, n] (+)= c[m, n] * scale[m] + bias[n] (scale_on input) or (c[m, n] + bias[n]) * scale[m] (scale_on output).
struct StoreTile {
  int64_t M, N;
  const void* c;      // values, rows kTileColumns apart
  const void* bias;   // null or values [N]
  const void* scale;  // null or values [M]
  ScaleOn scale_on;
  void* out;
  DType dtype;
  int64_t row_stride, col_stride;
  // Past the caches: for outputs larger than they are, which would be read before they are written.
  bool stream = false;
  bool accumulate = false;  // added to what out holds, before it is rounded to out's type
};

// c[m, n] (+)= sum over k of a(m, k) * b(n, k), in values; where multiplies_bf16 and both are bfloat16, in pairs along
// k.
struct GemmTile {
  int64_t M, N, K;  // M and N at least 1
  TileOperand a;    // [M, K]
  TileOperand b;    // [N, K]
  void* c;          // values [M, N], rows kTileColumns apart
  void* scratch;    // kGemmScratch values, aligned to 64 bytes
  bool accumulate = false;
  // A second product of the same a: c2 (+)= a . b2, where c2 is not null; b2 is laid out like b.
  TileOperand b2{};
  void* c2 = nullptr;
  // The bits of a row of c are the same whatever M is: one kernel for few rows and for many.
  bool batch_invariant = false;
  // Done to every part of c as soon as it is complete, where not null; only for products whose b is k_rows.
  const StoreTile* finish = nullptr;
  // Calls with the same number, if it is not 0, have the same a, M and K (not b and N): what a thread has laid out of
  // it serves again.
  int64_t same_a = 0;
};

// out[m, n] = activation(gate[m, n], up[m, n]).
struct ActivateTile {
  int64_t M, N;
  Activation activation;
  const void *gate, *up;  // values, rows kTileColumns apart
  void* out;
  DType dtype;  // of out: values or bfloat16
  int64_t out_stride;
};

// From dout = g * scale: dgate, dup; act * scale for the gradient of w2; and sums[m] = sum over n of g * act.
struct ActivateBackwardTile {
  int64_t M, N;
  Activation activation;
  const void *gate, *up, *g;  // values, rows kTileColumns apart
  const void* scale;          // null or values [M]
  DType dtype;                // of dgate, dup and act: values or bfloat16
  void *dgate, *dup;
  int64_t dh_stride;
  void* act;  // null or act * scale
  int64_t act_stride;
  void* sums;  // values [M]
};

// out [N] = sum over j of weights[j] * rows[slots[j]], in order, slots below 0 left out, + onto_scale * onto + sum over
// c of mix[c] * constants[c]; out, onto and constants of any dtype.
struct CombineRow {
  int64_t k, N;
  const void* rows;  // values
  int64_t row_stride;
  const int32_t* slots;
  const void* weights;  // null or values [k]
  void* out;
  DType dtype;
  const void* onto = nullptr;        // null or [N]
  const void* onto_scale = nullptr;  // null (one) or a value
  int64_t C = 0;
  const void* mix = nullptr;        // values [C]
  const void* constants = nullptr;  // [C, N], rows constants_stride apart
  int64_t constants_stride = 0;
};

struct GemmKernels {
  void (*gemm)(const GemmTile&);
  void (*store)(const StoreTile&);
  // Elements of any dtype to values: out[m, n] = in(m, n).
  void (*widen)(const TileMatrix& in, int64_t M, int64_t N, void* out, int64_t out_stride);
  void (*activate)(const ActivateTile&);
  void (*activate_backward)(const ActivateBackwardTile&);
  void (*combine)(const CombineRow&);
  // Sum over n of a[n] * b[n]; values.
  void (*dot)(const void* a, const void* b, int64_t N, bool is_double, void* out);
  // Bytes of the values that lie side by side in a panel.
  int64_t panel_bytes;
  // Products of two bfloat16 operands are faster than those of values.
  bool multiplies_bf16 = false;
};

namespace generic {
extern const GemmKernels gemm_kernels;
}
namespace avx2 {
extern const GemmKernels gemm_kernels;
}
namespace avx512 {
extern const GemmKernels gemm_kernels;
}
namespace avx512_bf16 {
void gemm(const GemmTile&);
}
namespace amx {
void gemm(const GemmTile&);
}

const GemmKernels& gemm_kernels();

// What one GEMM leaves for the next where the operator's tensors have dtype x.
inline DType between_gemms(DType x) {
  if (x == DType::bf16 && gemm_kernels().multiplies_bf16) return x;
  return x == DType::f64 ? x : DType::f32;
}

}  // namespace moert::cpu
