// Products of bfloat16 in tile registers.  All else is as AVX512-BF16 and AVX-512 have it.
#include <utility>

#include "cpu/gemm_amx_panels.h"
#include "cpu/gemm_amx_rows.h"
#include "cpu/gemm_tile.h"

namespace moert::cpu::amx {

// Fewer rows of x come at memory's speed as dot products.
constexpr int64_t kDotRowsAtMost = 2;

void gemm(const GemmTile& t) {
  static thread_local LaidOut last;
  const LaidOut before = std::exchange(last, {});
  if (t.a.matrix.dtype != DType::bf16 || t.b.matrix.dtype != DType::bf16) return avx512::gemm_kernels.gemm(t);
  const bool weight_rows = !t.b.k_rows && !t.b.panels && t.b.matrix.col_stride == 1 && !t.finish;
  if (!weight_rows) return gemm_tile_panels(t);
  if (t.M <= kDotRowsAtMost && !t.batch_invariant && is_dots(t)) return avx512_bf16::gemm(t);
  gemm_weight_rows(t, t.same_a && before.scratch == t.scratch && before.number == t.same_a);
  last = {t.scratch, t.same_a};
}

}  // namespace moert::cpu::amx
