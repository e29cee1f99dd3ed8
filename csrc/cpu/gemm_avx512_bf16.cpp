// Products of pairs of bfloat16.  All else is as AVX-512 has it.
#include "cpu/gemm_tile.h"

namespace moert::cpu::avx512_bf16 {

void gemm(const GemmTile& t) {
  if (t.a.matrix.dtype != DType::bf16 || t.b.matrix.dtype != DType::bf16) return avx512::gemm_kernels.gemm(t);
  is_dots(t) ? gemm_dots_in_parts<Pair, bf16>(t) : gemm_panels<Pair>(t);
}

}  // namespace moert::cpu::avx512_bf16
