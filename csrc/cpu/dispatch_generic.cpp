#include "cpu/dispatch_rows.h"

namespace moert::cpu::generic {

const DispatchKernels dispatch_kernels = {round_row, widen_row};

}  // namespace moert::cpu::generic
