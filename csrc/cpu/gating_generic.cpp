#include "cpu/gating_kernel.h"

namespace moert::cpu::generic {

const GatingKernels gating_kernels = {forward_tokens<float>, backward_tokens<float>};
const GatingKernels gating_kernels_f64 = {forward_tokens<double>, backward_tokens<double>};

}  // namespace moert::cpu::generic
