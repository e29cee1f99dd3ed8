#include "cpu/dispatch_rows.h"

namespace moert::cpu::avx2 {

const DispatchKernels dispatch_kernels = {round_row, widen_row};

}  // namespace moert::cpu::avx2
