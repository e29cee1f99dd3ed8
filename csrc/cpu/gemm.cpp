#include "cpu/gemm_isa.h"
#include "moert/isa.h"

namespace moert::cpu {

const GemmKernels& gemm_kernels() {
#if defined(__x86_64__)
  if (isa() >= Isa::avx512) return avx512::gemm_kernels;
  if (isa() >= Isa::avx2) return avx2::gemm_kernels;
#endif
  return generic::gemm_kernels;
}

}  // namespace moert::cpu
