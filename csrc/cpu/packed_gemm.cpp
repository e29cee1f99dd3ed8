#include "cpu/packed_gemm_isa.h"
#include "moert/isa.h"

namespace moert::cpu {

#if defined(__x86_64__)
static PackedGemmKernels tile_kernels() {
  PackedGemmKernels kernels = avx512_vnni::packed_gemm_kernels;
  kernels.gemm = amx::packed_gemm;
  kernels.dequantize_bf16 = amx::dequantize_bf16;
  return kernels;
}
#endif

const PackedGemmKernels& packed_gemm_kernels() {
#if defined(__x86_64__)
  static const PackedGemmKernels tiles = tile_kernels();
  if (isa() >= Isa::amx) return tiles;
  if (isa() >= Isa::avx512_vnni) return avx512_vnni::packed_gemm_kernels;
  if (isa() >= Isa::avx512) return avx512::packed_gemm_kernels;
  if (isa() >= Isa::avx2) return avx2::packed_gemm_kernels;
#endif
  return generic::packed_gemm_kernels;
}

}  // namespace moert::cpu
