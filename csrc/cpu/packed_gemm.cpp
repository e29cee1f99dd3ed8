#include "cpu/packed_gemm_isa.h"
#include "moert/isa.h"

namespace moert::cpu {

const PackedGemmKernels& packed_gemm_kernels() {
#if defined(__x86_64__)
  if (isa() >= Isa::avx512_vnni) return avx512_vnni::packed_gemm_kernels;
  if (isa() >= Isa::avx512) return avx512::packed_gemm_kernels;
  if (isa() >= Isa::avx2) return avx2::packed_gemm_kernels;
#endif
  return generic::packed_gemm_kernels;
}

}  // namespace moert::cpu
