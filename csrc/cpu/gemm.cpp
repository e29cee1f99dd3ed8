#include "cpu/gemm_isa.h"
#include "moert/isa.h"

namespace moert::cpu {

#if defined(__x86_64__)
static GemmKernels pair_kernels() {
  GemmKernels kernels = avx512::gemm_kernels;
  kernels.gemm = isa() >= Isa::amx ? amx::gemm : avx512_bf16::gemm;
  kernels.multiplies_bf16 = true;
  return kernels;
}
#endif

const GemmKernels& gemm_kernels() {
#if defined(__x86_64__)
  static const GemmKernels pairs = pair_kernels();
  if (isa() >= Isa::avx512_bf16) return pairs;
  if (isa() >= Isa::avx512) return avx512::gemm_kernels;
  if (isa() >= Isa::avx2) return avx2::gemm_kernels;
#endif
  return generic::gemm_kernels;
}

Panel panel_of(DType dtype) {
  const GemmKernels& kernels = gemm_kernels();
  const int64_t value = dtype == DType::f64 ? sizeof(double) : sizeof(float);
  return {kernels.panel_bytes / value, dtype == DType::bf16 && kernels.multiplies_bf16 ? 2 : 1};
}

}  // namespace moert::cpu
