// Products of bfloat16 in tile registers.  All else is as AVX512-BF16 and AVX-512 have it.
#include "cpu/gemm_amx_panels.h"
#include "cpu/gemm_amx_rows.h"
#include "cpu/gemm_tile.h"

namespace moert::cpu::amx {

// Fewer rows of x come at memory's speed as dot products.
constexpr int64_t kFewRows = 2;

void gemm(const GemmTile& t) {
  if (t.a.matrix.dtype != DType::bf16 || t.b.matrix.dtype != DType::bf16) return avx512::gemm_kernels.gemm(t);
  const bool weight_rows = !t.b.k_rows && !t.b.panels && t.b.matrix.col_stride == 1 && !t.finish;
  if (weight_rows && t.M <= kFewRows && !t.batch_invariant && is_dots(t)) return avx512_bf16::gemm(t);
  weight_rows ? gemm_weight_rows(t) : gemm_tile_panels(t);
}

}  // namespace moert::cpu::amx
