#include "cpu/gating_kernel.h"

namespace moert::cpu::avx2 {

const GatingKernels gating_kernels = {forward_tokens<float>, backward_tokens<float>};

}  // namespace moert::cpu::avx2
